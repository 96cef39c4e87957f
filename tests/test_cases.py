"""Compositions that the language of routing refuses: a file of tests/cases for each.

A file's first lines are comments with what is said of it, `line:col: message`, counted in the file.
`# layers: N` among them... gives the rest of the model; all else is the section `moe`.
"""
