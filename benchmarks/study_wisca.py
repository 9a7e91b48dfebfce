"""What WISCA shifts in small LLaMAs with 1, 4 and 8 query heads for each key-value head: the study behind data/.

For every group size: paired runs of all arms, without gradient clipping; with it, those arms that say what clipping
does to the control. Writes `wisca_study.csv` (a row for each group size, clipping, arm, component and quantity),
`wisca_study.png`, and the tables of `wisca_study.md`, below the words that stand there. The runs stay in --runs; a
study that was cut short goes on there.

    python benchmarks/study_wisca.py                     # small: two CPU cores
    python benchmarks/study_wisca.py --hidden 512 --layers 6 --steps 4000 --batch 32 --length 256   # one GPU
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from weightdyn import wisca
from weightdyn.train.corpus import Corpus

GROUPS = (1, 4, 8)
SIZE = ("hidden", "layers", "batch", "length", "lr", "weight_decay")
EXACT = (
    "init power_of_two",
    "lr_equivalent power_of_two",
)  # of 4 heads α is near 1/2, and nothing is rounded
CLIPPED = {
    4: ("none", *EXACT, f"{EXACT[1]} clip=rescaled"),
    8: ("none", "init", "lr_equivalent", "lr_equivalent clip=rescaled"),
}


def arms(every: int) -> list[str]:
    rescaled = [f"every={every} moments={moments}" for moments in ("transport", "keep", "reset")]
    return ["none", "init", "init norm=l2", *rescaled, "random", "lr_equivalent"]


def make_model(seed: int, args: argparse.Namespace, group: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=8,
        num_key_value_heads=8 // group,
        max_position_embeddings=args.length + 1,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(args.device)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [each for each in model.parameters() if each.ndim > 1]
    gains = [each for each in model.parameters() if each.ndim < 2]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay)


def batch(seed: int, update: int, text: Corpus, args: argparse.Namespace) -> torch.Tensor:
    return text.batch(seed, update, args.batch, args.length)


def schedule(update: int, args: argparse.Namespace) -> float:
    warmup = max(1, args.steps // 15)
    if update <= warmup:
        return update / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (update - warmup) / (args.steps - warmup)))


@torch.no_grad()
def evaluate(model: nn.Module, text: Corpus, args: argparse.Namespace) -> float:
    sequences = text.evaluation(64, args.length).to(args.device)
    losses = [float(model(input_ids=part, labels=part).loss) for part in sequences.split(args.batch)]
    return sum(losses) / len(losses)


def train(args: argparse.Namespace, group: int, clip: float | None) -> wisca.Comparison:
    text = Corpus.read()
    return wisca.compare(
        functools.partial(make_model, args=args, group=group),
        functools.partial(make_optimizer, args=args),
        functools.partial(batch, text=text, args=args),
        [*arms(args.every), *(EXACT if group == 4 else ())] if clip is None else CLIPPED[group],
        range(args.seeds),
        args.steps,
        schedule=functools.partial(schedule, args=args),
        clip=clip,
        evaluate=functools.partial(evaluate, text=text, args=args),
        eval_every=args.steps // 4,
        log_every=args.log_every,
        weibull_every=max(1, args.steps // 20),
        config={name: getattr(args, name) for name in SIZE},
        out=args.runs / f"group-{group}{'' if clip is None else '-clipped'}",
        n_jobs=args.jobs,
    )


GAP = "largest |loss difference| of any update"
COMPONENTS = ("q", "k", "v", "o")
SHARES = ("alignment_share", "injection_share", "decay_share")


def results(found: wisca.Comparison, args: argparse.Namespace) -> pd.DataFrame:
    """Shifts of all arms against "none", and of the control against "init"."""
    pairs = [(arm, "none") for arm in found.arms if arm != "none"]
    twins = {arm: arm.replace("lr_equivalent", "init").replace(" clip=rescaled", "") for arm in found.arms}
    pairs += [(arm, twin) for arm, twin in twins.items() if arm != twin]
    tables = []
    for arm, against in pairs:
        for window, name in ((args.steps, "whole run"), (args.steps // 4, "last quarter")):
            shift = found.shift(arm, against, by="component", window=window)
            shift = shift[(shift["step"] == args.steps) & (shift["quantity"] != "eval_loss")]
            tables.append(shift.assign(arm=arm, against=against, over=name))
        shift = found.shift(arm, against, by="component")
        first = shift[(shift["step"] == 0) & shift["quantity"].isin(["lam", "k"])]
        last = shift[(shift["step"] == args.steps) & shift["quantity"].isin(["lam", "k", "eval_loss"])]
        tables += [
            first.assign(arm=arm, against=against, over="start"),
            last.assign(arm=arm, against=against, over="end"),
        ]
        wide = found.metrics().pivot_table(index="step", columns=["arm", "seed"], values="loss")
        gap = (wide[arm] - wide[against]).abs()
        gaps = {"first half": gap[gap.index <= args.steps // 2].max().max(), "whole run": gap.max().max()}
        for over, value in gaps.items():
            row = {"arm": arm, "against": against, "over": over, "quantity": GAP, "difference": value}
            tables.append(pd.DataFrame([{**row, "seeds": gap.shape[1]}]))
    table = pd.concat(tables, ignore_index=True)
    return table[table["component"].isin(COMPONENTS) | table["component"].isna()]


def draw(found: dict[int, wisca.Comparison], args: argparse.Namespace) -> None:
    """One column for each group size: what `init` shifts for the keys, and the loss of its control beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from weightdyn import plot

    window = max(1, args.steps // 20)
    with plt.rc_context({"font.size": 7, "axes.titlesize": 7, "axes.labelsize": 8}):
        figure, grid = plt.subplots(
            4, len(found), figsize=(6.8, 5.8), sharex=True, sharey="row", layout="constrained", dpi=200
        )
        for column, (group, comparison) in enumerate(found.items()):
            panels = grid[:, column]
            plot.wisca_shift(comparison.shift("init", by="component", window=window), group="k", ax=panels)
            control = comparison.shift("lr_equivalent", window=window)
            rows = control[control["quantity"] == "eval_loss"]
            panels[3].plot(
                rows["step"],
                rows["difference"],
                "x--",
                color="#000000",
                ms=3,
                lw=0.8,
                label="lr equivalent, eval loss",
            )
            panels[0].set_title(f"{group} query head{'s' if group > 1 else ''} for each key head", pad=25)
            if column:
                for panel in panels:
                    panel.set_ylabel("")
                panels[0].get_legend().remove()
                panels[3].get_legend().remove()
            else:
                panels[3].legend(loc="best", frameon=False, fontsize=6)
        figure.align_ylabels()
        figure.savefig(args.out / "wisca_study.png")
        plt.close(figure)


MARK = "<!-- What follows is written by benchmarks/study_wisca.py. -->"


def interval(row: pd.Series, scale: float = 1, digits: int = 4) -> str:
    """Difference and interval; in bold where zero is outside."""
    middle, low, high = (f"{scale * row[name]:+.{digits}f}" for name in ("difference", "low", "high"))
    text = f"{middle} [{low}, {high}]"
    return f"**{text}**" if row["low"] > 0 or row["high"] < 0 else text


def markdown(table: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + "---|" * table.shape[1]]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    return "\n".join(lines)


def page(table: pd.DataFrame, alphas: pd.DataFrame, args: argparse.Namespace) -> str:
    """The tables of the page, of what `results` found."""
    free = table[~table["clipped"]]
    versus = free[free["against"] == "none"]

    def cells(rows: pd.DataFrame, index: str | list[str], scale: float = 1, digits: int = 4) -> str:
        text = rows.assign(cell=[interval(row, scale, digits) for _, row in rows.iterrows()])
        order = text[index].drop_duplicates() if isinstance(index, list) else list(dict.fromkeys(text[index]))
        wide = text.pivot_table(index=index, columns="group", values="cell", aggfunc="first")
        wide = wide.reindex(pd.MultiIndex.from_frame(order) if isinstance(index, list) else order)
        wide.columns = [f"group {group}" for group in wide.columns]
        return markdown(wide.fillna("not run").reset_index())

    ends = versus[(versus["quantity"] == "eval_loss") & (versus["over"] == "end")]
    controls = ends.groupby("group")["control"].first().map("{:.4f}".format)
    gaps = table[
        (table["quantity"] == GAP) & ((table["against"] != "none") | table["arm"].isin(["init", EXACT[0]]))
    ]
    gaps = gaps.assign(
        cell=gaps["difference"].map("{:.1e}".format),
        clipping=gaps["clipped"].map({True: f"{args.clip:g}", False: "none"}),
    )
    gaps = gaps.pivot_table(
        index=["clipping", "arm", "against", "over"], columns="group", values="cell", aggfunc="first"
    )
    gaps = gaps.fillna("not run").reset_index()
    size = (
        f"width {args.hidden}, {args.layers} layers, 8 heads, {args.steps} updates of {args.batch} × {args.length} "
        f"bytes, {args.seeds} seeds, peak lr {args.lr:g}, decay {args.weight_decay:g}, {args.device}"
    )
    parts = [
        MARK,
        f"Size of the run: {size}. Group: query heads for each key-value head. Cells are arm minus `none`, with "
        "the 95 % interval of Student's t over the seeds; bold where zero is outside. No clipping unless said.",
        "## α of the first rescaling (mean over layers and seeds)",
        markdown(alphas),
        "## Held-out loss at the end, nats per byte",
        f"Of `none`: {', '.join(f'{value} (group {group})' for group, value in controls.items())}.",
        cells(ends, "arm"),
        "## Training loss, mean over the last quarter",
        cells(versus[(versus["quantity"] == "loss") & (versus["over"] == "last quarter")], "arm"),
        "## Shares of the budget over the whole run, percentage points, `init`",
        cells(
            versus[(versus["arm"] == "init") & versus["quantity"].isin(SHARES) & (versus["over"] == "whole run")]
            .sort_values(["component"], key=lambda c: c.map(COMPONENTS.index), kind="stable"),
            ["component", "quantity"], 100, 1,
        ),
        f"## Shares of the budget in the last quarter, percentage points, group {GROUPS[-1]}, by arm",
        arm_shares(versus[(versus["group"] == GROUPS[-1]) & (versus["over"] == "last quarter")]),
        "## λ and k of `init`: at the start, and at the end",
        cells(
            versus[
                (versus["arm"] == "init")
                & (versus["quantity"].eq("lam") | (versus["quantity"].eq("k") & versus["over"].eq("end")))
                & versus["over"].isin(["start", "end"])
            ]
            .sort_values(["component"], key=lambda c: c.map(COMPONENTS.index), kind="stable"),
            ["component", "quantity", "over"],
        ),
        "## Largest difference of the training loss at any update, over all seeds",
        markdown(gaps.rename(columns={group: f"group {group}" for group in GROUPS})),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def arm_shares(rows: pd.DataFrame) -> str:
    rows = rows[rows["quantity"].isin(SHARES)]
    text = rows.assign(cell=[interval(row, 100, 1) for _, row in rows.iterrows()])
    order = text[["arm", "component"]].drop_duplicates()
    wide = text.pivot_table(index=["arm", "component"], columns="quantity", values="cell", aggfunc="first")
    wide = wide.reindex(pd.MultiIndex.from_frame(order))[list(SHARES)].reset_index()
    return markdown(wide)


def first_alphas(found: dict[int, wisca.Comparison]) -> pd.DataFrame:
    tables = [comparison.rescales().assign(group=group) for group, comparison in found.items()]
    table = pd.concat(tables)
    table = table[table["step"].eq(0) & table["arm"].isin(["init", "init norm=l2"])]
    wide = table.pivot_table(index=["arm", "pair"], columns="group", values="alpha").round(3).reset_index()
    return wide.rename(columns={group: f"group {group}" for group in found})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("hidden", 64, "width; there are 8 heads"),
        ("layers", 2, "blocks"),
        ("steps", 400, "updates"),
        ("batch", 8, "sequences in an update"),
        ("length", 64, "bytes in a sequence"),
        ("seeds", 3, "seeds"),
        ("every", 50, "updates between the rescalings of the every= arms"),
        ("log-every", 1, "updates between force rows"),
        ("jobs", 1, "runs at a time"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate [4e-3]")
    parser.add_argument("--weight-decay", type=float, default=0.5, help="decoupled decay [0.5]")
    parser.add_argument("--clip", type=float, default=1.0, help="of the runs that are clipped [1.0]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/wisca_study"), help="folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder of the results")
    return parser.parse_args()


def main() -> None:
    args = parse()
    began = time.perf_counter()
    kinds = [*((group, None) for group in GROUPS), *((group, args.clip) for group in CLIPPED)]
    found = {(group, clip): train(args, group, clip) for group, clip in kinds}
    print(f"trained in {time.perf_counter() - began:.0f} s (runs that were there already not counted)")
    table = pd.concat(
        [
            results(each, args).assign(group=group, clipped=clip is not None)
            for (group, clip), each in found.items()
        ],
        ignore_index=True,
    )
    names = ["group", "clipped", "arm", "against", "over", "component", "quantity"]
    table = table[[*names, "value", "control", "difference", "low", "high", "seeds"]]
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "wisca_study.csv", index=False, float_format="%.6g")
    free = {group: each for (group, clip), each in found.items() if clip is None}
    draw(free, args)
    place = args.out / "wisca_study.md"
    words = place.read_text(encoding="utf-8").split(MARK)[0] if place.exists() else ""
    place.write_text(words + page(table, first_alphas(free), args), encoding="utf-8")
    print(place)


if __name__ == "__main__":
    main()
