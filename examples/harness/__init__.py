"""What all examples share: the command, the training, the measures, the record and the plots.

An example is a function from a `Setting` to `Results` under `@command(About(...))`; see
examples/svm_mixture.py for one without a network.
"""

from examples.harness.command import Setting as Setting
from examples.harness.command import command as command
from examples.harness.fit import Schedule as Schedule
from examples.harness.fit import compiled as compiled
from examples.harness.fit import fit as fit
from examples.harness.results import About as About
from examples.harness.results import Claim as Claim
from examples.harness.results import Results as Results
from examples.harness.results import Run as Run

__all__ = ["About", "Claim", "Results", "Run", "Schedule", "Setting", "command", "compiled", "fit"]
