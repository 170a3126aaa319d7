"""All that knows Flower, whose transport carries our questions and replies: only it and engines import flwr."""

import os

from emberfed.flower.environment import QUIET

os.environ.update(QUIET)  # before flwr is imported, which reads them then
