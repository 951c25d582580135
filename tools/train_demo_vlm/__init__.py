"""How the weights of `evengaze.demo` were made: `python -m tools.train_demo_vlm --help`."""
