"""What a network costs: parameters, operations, latency in the forms in which it can be run, memory."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import sys
import tempfile
