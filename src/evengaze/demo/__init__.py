"""An embedded tiny vision-language model with its pictures and questions: everything a first try needs, offline."""

from evengaze.demo.dataset import DemoImage, DemoQuestion, make_dataset, write_dataset
from evengaze.demo.model import load

__all__ = ["DemoImage", "DemoQuestion", "load", "make_dataset", "write_dataset"]
