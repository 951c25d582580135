"""How many pictures a calibration needs: curves from few pictures against one from many, on the embedded model.

    python benchmarks/pictures_needed.py

Draws disjoint sets of N calibration pictures, one question each, calibrates FastV's layer 1 on each, and says how far
the weights are from those of all pictures together, how wide the curve's own confidence band is, and how even the
ranking of evaluation pictures becomes with it.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean

import evengaze as eg
from evengaze.calibration.calibrate import to_curve
from evengaze.calibration.observe import observe
from evengaze.debias import Debias
from evengaze.debias.trend import max_log_ratio
from evengaze.demo.experiment import BATCH, LAYER, calibration_samples

METHOD = eg.FastV(keep=0.25, layer=LAYER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--draws", type=int, default=4, help="disjoint sets of each size")
    parser.add_argument("--evaluate", type=int, default=100, help="evaluation pictures")
    options = parser.parse_args()
    model, processor = eg.demo.load()
    count = max(options.sizes) * options.draws
    seeds = -(-count // 64)
    pictures = [p for seed in range(seeds) for p in eg.demo.make_dataset("calibration", seed=seed)][:count]
    held_out = calibration_samples(eg.demo.make_dataset("eval", images=options.evaluate))

    def curve_of(some):
        found = observe(model, processor, calibration_samples(some), METHOD, batch_size=BATCH)
        return to_curve(found, LAYER - 1)

    def off(debias):
        found = observe(model, processor, held_out, METHOD, debias=debias, batch_size=BATCH)
        one = found.measures(LAYER - 1, after=debias is not None)["kept_index"]
        return one.value - one.even

    whole = curve_of(pictures)
    print(f"plain ranking: kept tokens are {off(None):+.3f} of the raster off; with the curve of all {count} pictures:")
    print(f"{off(Debias.of(whole)):+.3f}\n")
    print(
        "| pictures | weights off by a factor of (worst) | own band, bounds apart | place of kept, off even (worst) |"
    )
    print("|---|---|---|---|")
    for size in options.sizes:
        curves = [curve_of(pictures[i * size : (i + 1) * size]) for i in range(options.draws)]
        factors = [math.exp(max_log_ratio(one.trend, whole.trend)) for one in curves]
        bands = [one.band.width for one in curves]
        places = [abs(off(Debias.of(one))) for one in curves]
        print(
            f"| {size} | {mean(factors):.2f} ({max(factors):.2f}) | {mean(bands):.2f} | "
            f"{mean(places):.3f} ({max(places):.3f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
