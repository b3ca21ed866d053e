"""The paper's figures and tables, each as data, plot and verdict: ``blaq reproduce``."""

from .experiments import EXPERIMENTS, Options, Outcome

__all__ = ["EXPERIMENTS", "Options", "Outcome"]
