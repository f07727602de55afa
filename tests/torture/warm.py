"""Imported once by the server that forks the campaign's runs: all that a run imports, and the captures of its models.

Runs then start at once, and their time is that of their own work.
"""

import os
from pathlib import Path

import onnxruntime  # noqa: F401
import torch
import transformers.models.llama  # noqa: F401

import compiler.frontend.capture  # noqa: F401
from compiler import job, plan
from compiler.recipe import Recipe

PLANNED = "TORTURE_RECIPES"
"""The variable of the environment that names the recipes, by path."""

torch.set_num_threads(1)
for path in filter(None, os.environ.get(PLANNED, "").split(os.pathsep)):
    plan.make_plan(Recipe.load(Path(path)))
assert job
