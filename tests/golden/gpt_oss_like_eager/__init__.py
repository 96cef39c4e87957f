"""gpt-oss-like: import Model from here."""

from .model import Model as Model
from .model import Output as Output
from .model import Routing as Routing
