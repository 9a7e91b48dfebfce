"""What weight decay 0.1 instead of 0.01 means for Pythia: timescales, and the forces recovered from its σ(t).

Pythia's configuration files say 0.1; the table of its paper says 0.01, which its maintainers called an error. The
public σ of Pythia-70M's transmission matrices over training (repository tiexinding/NPM-Weibull-public, CC BY 4.0,
by Tiexin Ding) is all that `balance` needs.

    WEIGHTDYN_REFERENCE=<your copy> python benchmarks/study_pythia_decay.py    # writes data/pythia_decay.md
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd

import weightdyn as wd

SIZES = ("14m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")
CLOSURE = "Weibull_WeightScale_dynamics/derived_data/real_pythia/realpythia_closure.json"
WEIGHTS = 14_155_776  # of the transmission matrices of Pythia-70M
OUT = Path(__file__).parent.parent / "data" / "pythia_decay.md"


def timescales() -> pd.DataFrame:
    rows = []
    for size in SIZES:
        recipe = wd.Recipe.preset(f"pythia-{size}")
        peak = float(recipe.lr_at(pd.RangeIndex(1, 3000).to_numpy()).max())
        row: dict[str, object] = {"model": f"pythia-{size}", "peak η": f"{peak:.2g}"}
        for decay in (0.1, 0.01):
            tau = wd.timescale(peak, decay)
            row |= {f"τ, λ={decay}": f"{tau:,.0f}", f"T/τ, λ={decay}": f"{143_000 / tau:.2f}"}
        rows.append(row)
    return pd.DataFrame(rows)


def published(reference: Path) -> pd.DataFrame:
    """‖W‖² of the transmission matrices at the public checkpoints, as `Checkpoints.measure` would have it."""
    log = pd.DataFrame(json.loads((reference / CLOSURE).read_text()))
    measured = pd.DataFrame({"step": log["step"], "tensor": "transmission", "component": "up"})
    return measured.assign(role="transmission", numel=WEIGHTS, norm_sq=WEIGHTS * log["sigma_obs"] ** 2)


def drift(reference: Path) -> pd.DataFrame:
    """Signed shares of drift, diffusion and decay with λ = 0.1, and the drift's interval on that scale."""
    table = wd.recover_forces(published(reference), wd.Recipe.preset("pythia-70m"), progress=False)
    shares = wd.budget(table, kind="drift").set_index("step")
    total = shares[["drift", "diffusion", "decay"]].abs().sum(axis=1)
    names = ("drift", "drift_low", "drift_high", "diffusion", "decay")
    return pd.DataFrame({name.replace("_", " "): shares[name] / total for name in names})


def recovered(reference: Path) -> pd.DataFrame:
    """Shares of the budget by `balance`, from σ at the public checkpoints, for both decays."""
    measured = published(reference)
    columns = {}
    for decay in (0.1, 0.01):
        recipe = wd.Recipe.preset("pythia-70m", weight_decay=decay)
        table = wd.budget(wd.recover_forces(measured, recipe, progress=False)).set_index("step")
        share = table["alignment_share"].where(table["alignment"] >= 0, -table["alignment_share"])
        columns[f"alignment, λ={decay}"] = share
        columns[f"decay, λ={decay}"] = table["decay_share"]
        columns[f"decay per update, λ={decay}"] = table["decay"]
    return pd.DataFrame(columns)


def markdown(table: pd.DataFrame) -> str:
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    reference = os.environ.get("WEIGHTDYN_REFERENCE")
    if not reference:
        raise SystemExit("set WEIGHTDYN_REFERENCE to your copy of the public data")
    table = recovered(Path(reference)).loc[1000:].reset_index()
    shown = table.rename(columns={"step": "up to update"})
    for name in shown.columns[1:]:
        shown[name] = shown[name].map("{:.3g}".format if "per update" in name else "{:+.2f}".format)
    shown["up to update"] = shown["up to update"].map("{:,}".format)
    split = drift(Path(reference)).loc[1000:].map("{:+.2f}".format).reset_index()
    split = split.rename(columns={"step": "up to update"})
    split["up to update"] = split["up to update"].map("{:,}".format)
    text = f"""# Pythia's weight decay: 0.1, not 0.01

Written by `benchmarks/study_pythia_decay.py`.

The relaxation time τ = 1/(ηλ) at the peak learning rate, in updates, and how many of it the run of T = 143,000 has:

{markdown(timescales())}

Shares of the force budget of Pythia-70M's transmission matrices, recovered by `balance` from the public σ(t)
(repository tiexinding/NPM-Weibull-public, CC BY 4.0, by Tiexin Ding), mean over the updates since the row above. A
negative alignment shrinks the weights. The decay per update is its contribution to ‖w‖².

{markdown(shown)}

With decay 0.01 the budget closes only if alignment turns negative after update 20,000; with the configuration's 0.1
it stays positive and balances decay to the end.

## Drift and diffusion

The same forces with λ = 0.1, split as if gradient noise were white: diffusion is theory, drift is what is left
of the change of ‖w‖², an inference. Shares of |drift| + |diffusion| + |decay|; low and high are the ends of its
interval, wide, for of these checkpoints only ‖W‖² is public, and not how far they lie apart.

{markdown(split)}

The interval is that of small trainings with batches of up to 32 sequences, and Pythia's batch is 1,024.
Gradients of a large batch swing back (the signal of batch 64 in drift.csv is below 0), which makes diffusion
smaller than white noise does, and a drift inferred from it too negative. So take the sign here for open:
checkpoints whose distances are known, or that hold the optimizer's state, would tell.
"""
    OUT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
