"""The command line: `weightdyn demo`, `weightdyn train`, `weightdyn plot RUN`.

A thin shell over the library: a command reads its arguments, calls what a notebook would call, and prints.
What a user got wrong ends in one line on stderr and exit code 2.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import pandas as pd
import typer

from weightdyn.core.forces import timescale
from weightdyn.core.naming import Views
from weightdyn.core.tables import FORCES, IDENTITY, By, aggregate
from weightdyn.explain.summary import summarize
from weightdyn.explain.trajectory import closure
from weightdyn.record.runlog import RunLog
from weightdyn.train.models import MODELS
from weightdyn.train.trainer import DEMO, TrainConfig, train

if TYPE_CHECKING:
    from weightdyn.checkpoints.recipe import Recipe
    from weightdyn.checkpoints.series import Checkpoints

app = typer.Typer(
    help="Why the weights of a network grow, overshoot and relax, in numbers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_DEFAULTS = TrainConfig()


_STAGE = "Series to take, where names tell several, as stage1 or stage1,stage2. [default: the first]"
_VIEWS = "Split fused tensors: true, false, or head for a row for each head of q, k and v."
_BY = "{what} for each layer, component, role or tensor, several as layer,component; or model for all in one."


def _views(word: str) -> Views:
    """The argument `views` from its word."""
    known: dict[str, Views] = {"true": True, "false": False, "head": "head"}
    if word not in known:
        raise ValueError(f"--views must be one of {', '.join(known)}, got {word!r}")
    return known[word]


def _by(words: str) -> By | list[str] | None:
    """The argument `by` from its words."""
    known = ("layer", "component", "role", "model")
    if words == "tensor":
        return None
    found = words.split(",")
    if unknown := [word for word in found if word not in known]:
        raise ValueError(f"--by must be tensor, or some of {', '.join(known)}, got {unknown[0]!r}")
    return cast(By, words) if len(found) == 1 else found


def _steps(words: str | None) -> list[int] | None:
    """Step numbers from 0,1000,2000."""
    if words is None:
        return None
    if not re.fullmatch(r"\s*[0-9]+\s*(,\s*[0-9]+\s*)*", words):
        raise ValueError(f"--steps must be whole numbers such as 0,1000,2000, got {words!r}")
    return [int(word) for word in words.split(",")]


def _stages(words: str | None) -> str | list[str] | None:
    """Names of stages from stage1,stage2."""
    return words.split(",") if words is not None and "," in words else words


def _check_file(option: str, path: Path | None, *endings: str) -> None:
    """Refuse a file that could not be written, before the work is done that it is meant for."""
    if path is None:
        return
    if path.suffix not in endings:
        raise ValueError(f"{option} must end in {' or '.join(endings)}, got {path}")
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; make it first")


def _check_folder(option: str, path: Path) -> None:
    """The same for a folder, which is made where there is none."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{option} {path}: {place} is a file; name a folder")


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell what the user got wrong in one line instead of a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo("Error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Say what the library warns of in a line, without the place in its source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: typer.echo(f"Warning: {message}", err=True)
        yield


@app.command(name="train")
def train_command(
    out: Annotated[Path, typer.Option(help="Run directory; a run that was cut short there is continued.")],
    model: Annotated[str, typer.Option(help=f"Shape: {', '.join(MODELS)}.")] = _DEFAULTS.model,
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Text file or folder, more than once if you like. [default: Python's own source]"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = _DEFAULTS.steps,
    batch_size: Annotated[int, typer.Option(help="Sequences in an update.")] = _DEFAULTS.batch_size,
    seq_len: Annotated[int, typer.Option(help="Bytes in a sequence.")] = _DEFAULTS.seq_len,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = _DEFAULTS.lr,
    schedule: Annotated[str, typer.Option(help="cosine or constant.")] = _DEFAULTS.schedule,
    warmup: Annotated[int, typer.Option(help="Updates of linear warm-up, at most steps.")] = _DEFAULTS.warmup,
    floor: Annotated[float, typer.Option(help="The cosine's end, as a fraction of lr.")] = _DEFAULTS.floor,
    betas: Annotated[tuple[float, float], typer.Option(help="AdamW's.")] = _DEFAULTS.betas,
    eps: Annotated[float, typer.Option(help="AdamW's.")] = _DEFAULTS.eps,
    weight_decay: Annotated[float, typer.Option(help="Decoupled decay.")] = _DEFAULTS.weight_decay,
    decayed: Annotated[str, typer.Option(help="What decays: matrices or all.")] = _DEFAULTS.decayed,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.")] = _DEFAULTS.clip
    or 0,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the data.")] = _DEFAULTS.seed,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = _DEFAULTS.device,
    log_every: Annotated[int, typer.Option(help="Updates between force rows.")] = _DEFAULTS.log_every,
    weibull_every: Annotated[int, typer.Option(help="… Weibull fits.")] = _DEFAULTS.weibull_every,
    eval_every: Annotated[int, typer.Option(help="… evaluations.")] = _DEFAULTS.eval_every,
    save_every: Annotated[int, typer.Option(help="… checkpoints.")] = _DEFAULTS.save_every,
) -> None:
    """Train a small language model on text, with the forces of every tensor on record."""
    with _told():
        _check_folder("--out", out)
        config = replace(
            _config(model, corpus, steps, batch_size, seq_len, lr, schedule, warmup, weight_decay),
            floor=floor,
            betas=betas,
            eps=eps,
            decayed=cast(Any, decayed),  # checked by TrainConfig
            clip=clip or None,
            seed=seed,
            device=device,
            log_every=log_every,
            weibull_every=weibull_every,
            eval_every=eval_every,
            save_every=save_every,
        )
        typer.echo(train(config, out))


def _config(
    model: str,
    corpus: list[str] | None,
    steps: int,
    batch_size: int,
    seq_len: int,
    lr: float,
    schedule: str,
    warmup: int,
    weight_decay: float,
) -> TrainConfig:
    """The options that both training commands have, as the trainer takes them."""
    return TrainConfig(
        model=model,
        corpus=tuple(corpus or ()),
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        schedule=cast(Any, schedule),  # checked by TrainConfig
        warmup=min(warmup, steps),
        weight_decay=weight_decay,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo"),
    steps: Annotated[int, typer.Option(help="Updates.")] = DEMO.steps,
    batch_size: Annotated[int, typer.Option(help="Sequences in an update.")] = DEMO.batch_size,
    seq_len: Annotated[int, typer.Option(help="Bytes in a sequence.")] = DEMO.seq_len,
    seed: Annotated[int, typer.Option(help="Of the weights and of the order of the data.")] = DEMO.seed,
) -> None:
    """Train a small GPT-NeoX on Python's own source, log what moves its norms, fit, draw: a few minutes."""
    with _told():
        _check_folder("--out", out)
        config = replace(
            DEMO,
            steps=steps,
            warmup=min(DEMO.warmup, steps),
            batch_size=batch_size,
            seq_len=seq_len,
            seed=seed,
        )
        run = train(config, out)
        typer.echo(_report(run))
        _draw(run, out / "figures")


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    by: Annotated[str, typer.Option(help=_BY.format(what="A panel or line"))] = "role",
    out: Annotated[Path | None, typer.Option(help="Folder for the figures. [default: RUN/figures]")] = None,
) -> None:
    """Draw the figures of a run: forces, drift and diffusion, their shares, the Weibull trajectory, the loss."""
    with _told():
        _draw(RunLog(run), out or run / "figures", _by(by), option="--out" if out else "RUN")


def _draw(run: RunLog, folder: Path, by: By | list[str] | None = "role", option: str = "--out") -> None:
    """Draw every figure that the run has rows for, then write them all, and say where they lie."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from weightdyn import plot

    _check_folder(option, folder)
    unit = "nats per byte" if "train" in run.info else None
    forces, weibull, metrics = run.forces(), run.weibull(), run.metrics()
    # Embeddings have scales of their own, that would flatten the blocks' lines.
    inside = weibull["layer"].notna()
    weibull = weibull[inside] if inside.any() else weibull
    both = weibull[weibull["role"].isin(set(forces["role"]))]
    losses = metrics if any("loss" in name for name in metrics) else metrics.iloc[:0]
    known = forces[:0] if aggregate(forces, by)["drift"].isna().all() else forces  # sums may be missing
    figures: dict[str, tuple[pd.DataFrame, Callable[[pd.DataFrame], Any]]] = {
        "overview": (both, lambda _: plot.overview(run)),
        "force_budget": (forces, lambda table: plot.force_budget(table, by=by)),
        "force_shares": (forces, lambda table: plot.force_budget(table, kind="shares", by=by)),
        "drift_budget": (known, lambda table: plot.force_budget(table, kind="drift", by=by)),
        "drift_shares": (known, lambda table: plot.force_budget(table, kind="drift_shares", by=by)),
        "weibull_trajectory": (weibull, lambda table: plot.weibull_trajectory(table, by=by)),
        "loss": (losses, lambda table: plot.loss(table, unit=unit)),
    }
    drawn = {
        name: np.ravel(draw(table))[0].get_figure() for name, (table, draw) in figures.items() if len(table)
    }
    if not drawn:
        raise ValueError(f"{run.path} has nothing to draw: no forces, no Weibull fits, no losses")
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png")
        plt.close(figure)
        typer.echo(folder / f"{name}.png")


def _report(run: RunLog) -> str:
    """Loss, and per role: the course of λ, κ, the worst closure, signed shares of drift, diffusion and decay."""
    losses = run.metrics()["eval_loss"].dropna()
    table = summarize(run)
    course = pd.DataFrame(
        {
            "role": table["role"],
            "λ start": table["start"].map("{:.4f}".format),
            "peak": table["peak"].map("{:.4f}".format),
            "at update": table["peak_step"].map("{:,}".format),
            "end": table["end"].map("{:.4f}".format),
            "driven by": table["driven_by"].fillna("unknown"),
            "κ": table["kappa"].map("{:.2f}".format),
            "worst closure": table["closure"].map("{:.1e}".format),
        }
    )
    shares = pd.DataFrame({"role": table["role"]})
    for stage, words in (("rise", "in the rise: drift"), ("end", "at the end: drift")):
        drift, diffusion = table[f"{stage}_drift"], table[f"{stage}_diffusion"]
        decay = drift.abs() + diffusion.abs() - 1  # the three add up to 1 without their signs
        for name, values in ((words, drift), ("diffusion", diffusion), ("decay", decay)):
            shown = values.map("{:+.0%}".format).where(values.notna(), "–")  # of a λ that never rose
            shares.insert(len(shares.columns), name, shown, allow_duplicates=True)
    config = TrainConfig.from_info(run.info)
    tau = timescale(config.lr, config.weight_decay)
    pooled = closure(run, by="model")
    return (
        f"\nτ = 1/(ηλ) = {tau:,.0f} updates at the peak of the learning rate; the run has {config.steps:,}\n"
        f"held-out loss {losses.iloc[0]:.3f} -> {losses.iloc[-1]:.3f} nats per byte\n\n"
        f"{course.to_string(index=False)}\n\n{shares.to_string(index=False)}\n\n"
        f"pooled closure, the part of all changes of ‖w‖² that the forces leave unexplained: "
        f"{pooled['closure'].item():.1e}\n"
    )


@app.command()
def fit(
    path: Annotated[Path, typer.Argument(help="Model folder, checkpoint file, or run directory.")],
    views: Annotated[str, typer.Option(help=_VIEWS)] = "true",
    by: Annotated[str, typer.Option(help=_BY.format(what="A fit"))] = "tensor",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the table there: .parquet or .csv.")
    ] = None,
) -> None:
    """Fit a Weibull law to every weight matrix of a checkpoint: λ, k, goodness of fit, tails."""
    from weightdyn.weibull.weights import fit_weights

    with _told():
        _check_file("--out", out, ".parquet", ".csv")
        table = fit_weights(path, views=_views(views), by=_by(by))
        if out is None:
            forms = {
                "numel": "{:,}",
                "lam": "{:.3g}",
                "k": "{:.4f}",
                "r_squared": "{:.4f}",
                "ks": "{:.4f}",
                "lam_over_rms": "{:.4f}",
                "top_share": "{:.2%}",
                "note": "{}",
            }
            if (table["note"] == "").all():
                del forms["note"]
            shown = pd.DataFrame({name: table[name].map(form.format) for name, form in forms.items()})
            keys = ["tensor"] if "tensor" in table else [name for name in IDENTITY if name in table]
            names = table[keys].astype("string").fillna("").agg(" ".join, axis=1).str.strip()
            names = names.replace("", "outside the blocks")
            shown.index = pd.Index(names.str.ljust(names.str.len().max())).rename(None)
            typer.echo(shown.to_string())
        elif out.suffix == ".csv":
            table.to_csv(out, index=False)
        else:
            table.to_parquet(out)
        if out is not None:
            typer.echo(f"{out}: {len(table)} rows")


@app.command(name="diagnose")
def diagnose_command(
    path: Annotated[Path, typer.Argument(help="Model folder, checkpoint file, or run directory.")],
    views: Annotated[str, typer.Option(help=_VIEWS)] = "true",
    database: Annotated[
        Path | None, typer.Option(help="CSV of published fits, to find the nearest model in.")
    ] = None,
) -> None:
    """Say what stands out in a checkpoint: matrices with the reason, kind of attention, nearest published model."""
    from weightdyn.weibull.diagnosis import diagnose

    with _told():
        typer.echo(diagnose(path, views=_views(views), database=database))


@app.command()
def measure(
    source: Annotated[str, typer.Argument(help="Run directory, folder of checkpoints, or hf://owner/name.")],
    steps: Annotated[str | None, typer.Option(help="Steps to take, as 0,1000,2000. [default: all]")] = None,
    stage: Annotated[str | None, typer.Option(help=_STAGE)] = None,
    gram: Annotated[str, typer.Option(help="Inner products between steps: none, band or full.")] = "none",
    weibull: Annotated[bool, typer.Option(help="Fit a Weibull law to each tensor.")] = True,
    views: Annotated[str, typer.Option(help=_VIEWS)] = "true",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what was measured. [default: beside the checkpoints]")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what is downloaded in the hub's cache.")] = False,
    skip: Annotated[
        bool, typer.Option("--skip", help="Leave out damaged checkpoints instead of stopping.")
    ] = False,
    endpoint: Annotated[str | None, typer.Option(help="Address of the hub.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the table.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be read or downloaded; measure nothing.")
    ] = False,
) -> None:
    """Measure a series of checkpoints, each once: norms, Weibull fits, rounding, inner products."""

    with _told(), _plain_warnings():
        _check_file("--out", out, ".parquet")
        series = _series(source, steps, stage, skip, keep, endpoint)
        place = cache or True
        if dry_run:
            plan = series.plan(cast(Any, gram), weibull, _views(views), cache=place)
            typer.echo(plan.to_string(index=False))
            left = plan[~plan["measured"]]
            verb = "download" if source.startswith("hf://") else "read"
            typer.echo(f"\nto {verb}: {len(left)} of {len(plan)} checkpoints, {left['bytes'].sum():,} bytes")
            return
        table = series.measure(cast(Any, gram), weibull, _views(views), cache=place)  # gram is checked there
        typer.echo(f"{len(table):,} rows: {len(series)} steps, {table['tensor'].nunique()} tensors")
        if out is not None:
            table.to_parquet(out)
            typer.echo(out)


wisca = typer.Typer(
    help="Rescale paired weights so that outputs stay and training changes.", no_args_is_help=True
)
app.add_typer(wisca, name="wisca")


@wisca.command(name="rescale")
def wisca_rescale(
    model: Annotated[Path, typer.Argument(help="Folder of a transformers model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the rescaled model.")],
    pairs: Annotated[str, typer.Option(help="Some of qk,vo,up_down,norm.")] = "qk,vo",
    norm: Annotated[str, typer.Option(help="l1, l2 or rms.")] = "l1",
    granularity: Annotated[str, typer.Option(help="One α for each tensor, head or channel.")] = "tensor",
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="Round α to powers of two: outputs stay to the last bit.")
    ] = False,
    max_alpha: Annotated[float | None, typer.Option(help="Keep α in [1/max_alpha, max_alpha].")] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out pairs that cannot be rescaled.")] = False,
) -> None:
    """Balance the norms of a model's paired weights; its outputs stay what they are."""
    from weightdyn.wisca import rescale_folder

    with _told():
        table, difference, magnitude = rescale_folder(
            model,
            out,
            pairs=tuple(pairs.split(",")),
            norm=norm,
            granularity=granularity,
            power_of_two=power_of_two,
            max_alpha=max_alpha,
            errors="skip" if skip else "raise",
        )
        done = table[table["skipped"].isna()].groupby("pair", sort=False)["alpha"]
        typer.echo(done.agg(["count", "min", "median", "max"]).reset_index().to_string(index=False))
        for reason in table["skipped"].dropna().unique():
            typer.echo(f"skipped: {reason}")
        typer.echo(f"max |Δlogit| {difference:.1e}, of max |logit| {magnitude:.1f}, on random tokens")
        typer.echo(out)


@app.command(name="forces")
def forces_command(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints with their optimizer's state: files, folders, folders of them, run directories, or "
            "hf://owner/name."
        ),
    ],
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the update, where a checkpoint does not tell it.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="The same by a published recipe, such as pythia-70m.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="AdamW or Adam, where a checkpoint does not say which.")
    ] = None,
    by: Annotated[str, typer.Option(help=_BY.format(what="A row"))] = "role",
    views: Annotated[str, typer.Option(help=_VIEWS)] = "true",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what is fetched and computed. [default: the user's cache]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the force table there: .parquet or .csv.")
    ] = None,
) -> None:
    """The exact forces of the updates that made checkpoints, from the optimizer's state in them."""
    from weightdyn.checkpoints.recipe import Recipe
    from weightdyn.checkpoints.states import forces_from_states
    from weightdyn.core.tables import budget

    with _told(), _plain_warnings():
        _check_file("--out", out, ".parquet", ".csv")
        if lr is not None and recipe is not None:
            raise ValueError("--lr and --recipe both name the learning rate: give one")
        rates = lr if recipe is None else Recipe.preset(recipe)
        table = forces_from_states(
            paths[0] if len(paths) == 1 else paths,
            lr=rates,
            optimizer=cast(Any, optimizer),  # checked there
            views=_views(views),
            cache=cache or True,
        )
        shares = budget(table, _by(by))
        keys = [name for name in IDENTITY if name in shares] if by != "tensor" else ["tensor"]
        columns = ["step", *keys, "norm_sq", *FORCES, *(f"{force}_share" for force in FORCES)]
        typer.echo(shares[columns].to_string(index=False, na_rep="", float_format="{:.4g}".format))
        if out is not None:
            table.to_csv(out, index=False) if out.suffix == ".csv" else table.to_parquet(out)
            typer.echo(f"{out}: {len(table)} rows")


def _series(
    source: str, steps: str | None, stage: str | None, skip: bool, keep: bool, endpoint: str | None
) -> Checkpoints:
    """The series that a command's options say."""
    from weightdyn.checkpoints.series import Checkpoints

    errors = "skip" if skip else "raise"
    return Checkpoints(
        source, _steps(steps), stage=_stages(stage), errors=errors, keep=keep, endpoint=endpoint
    )


def _recipe(source: str, name: str | None, weight_decay: float | None) -> Recipe:
    """The recipe of that name, or the run's own, with another decay if one is given."""
    from weightdyn.checkpoints.recipe import Recipe

    if name is None and not (Path(source) / "run.json").is_file():
        raise ValueError(f"--recipe is needed, such as pythia-70m: {source} is no run that knows its own")
    recipe = Recipe.from_run(source) if name is None else Recipe.preset(name)
    return recipe if weight_decay is None else replace(recipe, weight_decay=weight_decay)


@app.command()
def recover(
    source: Annotated[str, typer.Argument(help="Run directory, folder of checkpoints, or hf://owner/name.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Published recipe, such as pythia-70m. [default: the run's own, from its run.json]"
        ),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decay in place of the recipe's.")] = None,
    method: Annotated[str, typer.Option(help="balance, spline or two_point.")] = "balance",
    every: Annotated[
        int | None, typer.Option(min=1, help="Rows for every so many updates. [default: one for each gap]")
    ] = None,
    steps: Annotated[str | None, typer.Option(help="Steps to take, as 0,1000,2000. [default: all]")] = None,
    stage: Annotated[str | None, typer.Option(help=_STAGE)] = None,
    views: Annotated[str, typer.Option(help=_VIEWS)] = "true",
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what is measured. [default: beside the checkpoints]")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep what is downloaded in the hub's cache.")] = False,
    skip: Annotated[bool, typer.Option(help="Leave out damaged checkpoints instead of stopping.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Address of the hub.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the force table.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Image of the force budget.")] = None,
    dry_run: Annotated[
        bool, typer.Option(help="List what would be read or downloaded; read nothing.")
    ] = False,
) -> None:
    """Recover the forces of a training that nobody logged, from its checkpoints and its recipe."""
    from weightdyn.checkpoints.recovery import METHODS, recover_forces
    from weightdyn.core.tables import budget, diffusion

    with _told(), _plain_warnings():
        if method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
        _check_file("--out", out, ".parquet")
        _check_file("--figure", figure, ".png", ".pdf", ".svg")
        hyperparameters = _recipe(source, recipe, weight_decay)
        series = _series(source, steps, stage, skip, keep, endpoint)
        if dry_run:
            plan = series.plan(METHODS[method].gram, False, _views(views), cache=cache or True)
            left = plan[~plan["measured"]]
            verb = "download" if source.startswith("hf://") else "read"
            typer.echo(plan.to_string(index=False))
            typer.echo(f"\nto {verb}: {len(left)} of {len(plan)} checkpoints, {left['bytes'].sum():,} bytes")
            return
        place = cache or True
        table = recover_forces(series, hyperparameters, method, every, views=_views(views), cache=place)
        if out is not None:
            table.to_parquet(out)
        if figure is not None:
            import matplotlib

            matplotlib.use("Agg")
            from weightdyn import plot

            cast(Any, plot.force_budget(table)).get_figure().savefig(figure)
        shares = budget(table, "model").assign(diffusion=diffusion)
        picked = np.unique(np.linspace(0, len(shares) - 1, 10).round().astype(int))
        columns = ["step", "norm_sq", *FORCES, *(f"{force}_share" for force in FORCES), "drift", "diffusion"]
        typer.echo(shares.loc[picked, columns].to_string(index=False, float_format="{:.4g}".format))
        typer.echo(
            f"\n{method}: {len(table):,} rows of {table['tensor'].nunique()} tensors, τ = 1/(ηλ) = "
            f"{hyperparameters.tau:,.0f} updates at the peak of the learning rate; drift and diffusion are "
            "inferred, as if gradient noise were white"
        )
        for flag, count in table["flag"].value_counts().items():
            if flag:
                typer.echo(f"flagged {flag}: {count:,} rows")
        for file in (out, figure):
            if file is not None:
                typer.echo(file)


@app.command()
def audit(
    source: Annotated[str, typer.Argument(help="Run directory, folder of checkpoints, or hf://owner/name.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Published recipe, such as pythia-70m. [default: the run's own, from its run.json]"
        ),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decay in place of the recipe's.")] = None,
    steps: Annotated[str | None, typer.Option(help="Steps to take, as 0,1000,2000. [default: all]")] = None,
    stage: Annotated[str | None, typer.Option(help=_STAGE)] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for what is measured. [default: beside the checkpoints]")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Keep what is downloaded in the hub's cache.")] = False,
    skip: Annotated[bool, typer.Option(help="Leave out damaged checkpoints instead of stopping.")] = False,
    endpoint: Annotated[str | None, typer.Option(help="Address of the hub.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file for the table of findings.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Image of ηλ, the weights' and the recipe's.")] = None,
) -> None:
    """Hold a recipe against the weights: ηλ, size of updates, what decays, copied or swapped checkpoints.

    Exit code: 1 if the weights contradict the recipe, 0 if nothing does (or nothing is told), 2 for errors.
    """
    from weightdyn.checkpoints.audit import audit_recipe

    with _told(), _plain_warnings():
        _check_file("--out", out, ".parquet")
        _check_file("--figure", figure, ".png", ".pdf", ".svg")
        hyperparameters = _recipe(source, recipe, weight_decay)
        series = _series(source, steps, stage, skip, keep, endpoint)
        found = audit_recipe(series, hyperparameters, cache=cache or True)
        typer.echo(found)
        if out is not None:
            found.table.to_parquet(out)
            typer.echo(out)
        if figure is not None and found.clock is not None and found.clock["lr_decay"].notna().any():
            import matplotlib

            matplotlib.use("Agg")
            from weightdyn import plot

            cast(Any, plot.decay_clock(found.clock, hyperparameters)).get_figure().savefig(figure)
            typer.echo(figure)
        elif figure is not None:
            typer.echo(f"{figure}: not drawn, for the clock tells nothing")
    if found.verdict == "contradicts":
        raise typer.Exit(1)


@wisca.command(name="compare")
def wisca_compare(
    out: Annotated[Path, typer.Option(help="Folder for the runs; what it holds already is not run again.")],
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            help="An arm in words, such as 'every=250 moments=reset'; more than once. [default: none, init, "
            "every=250, random, lr_equivalent]",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, … of each arm.")] = 3,
    model: Annotated[str, typer.Option(help=f"Shape: {', '.join(MODELS)}.")] = "tiny-llama",
    corpus: Annotated[
        list[str] | None,
        typer.Option(help="Text file or folder, more than once if you like. [default: Python's own source]"),
    ] = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences in an update.")] = _DEFAULTS.batch_size,
    seq_len: Annotated[int, typer.Option(help="Bytes in a sequence.")] = _DEFAULTS.seq_len,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = _DEFAULTS.lr,
    schedule: Annotated[str, typer.Option(help="cosine or constant.")] = _DEFAULTS.schedule,
    warmup: Annotated[int, typer.Option(help="Updates of linear warm-up, at most steps.")] = _DEFAULTS.warmup,
    weight_decay: Annotated[
        float, typer.Option(help="Decoupled decay of the matrices.")
    ] = _DEFAULTS.weight_decay,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for none.")] = 0,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    by: Annotated[str, typer.Option(help=_BY.format(what="A figure"))] = "role",
) -> None:
    """Train with and without rescaling, the same weights and batches for each seed, and say what it shifts."""
    import torch

    from weightdyn.train.corpus import Corpus
    from weightdyn.train.models import make_model
    from weightdyn.wisca import ARMS, compare

    with _told():
        groups = _by(by)
        if groups is None:
            raise ValueError("--by tensor would be a figure for each tensor; group them")
        _check_folder("--out", out)
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch's, of a word or a device that it lacks
            raise ValueError(f"--device {device} cannot be used: {error}") from error
        config = _config(model, corpus, steps, batch_size, seq_len, lr, schedule, warmup, weight_decay)
        text, recipe = Corpus.read(*config.corpus), config.recipe

        def make_optimizer(network: torch.nn.Module) -> torch.optim.AdamW:
            decays = [each for each in network.parameters() if each.ndim >= 2]
            others = [each for each in network.parameters() if each.ndim < 2]
            groups = [{"params": decays}, {"params": others, "weight_decay": 0.0}]
            return torch.optim.AdamW(
                groups, lr=lr, betas=config.betas, eps=config.eps, weight_decay=weight_decay
            )

        found = compare(
            lambda seed: cast(Any, make_model(model, seed)).to(device),
            make_optimizer,
            lambda seed, update: text.batch(seed, update, batch_size, seq_len),
            arms or ARMS,
            range(seeds),
            steps,
            schedule=lambda update: float(recipe.lr_at(update)) / lr,
            clip=clip or None,
            out=out,
            config=asdict(config),
            n_jobs=jobs,
        )
        _draw_shifts(found, out / "figures", groups)


def _draw_shifts(found: Any, folder: Path, by: By | list[str] | None) -> None:
    """Print and draw what each arm shifts, against "none" or else the first arm; in numbers, the last quarter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from weightdyn import plot
    from weightdyn.plot.shifts import shift_groups

    against = "none" if "none" in found.arms else found.arms[0]
    steps = found.info["steps"]
    folder.mkdir(parents=True, exist_ok=True)
    for arm in [arm for arm in found.arms if arm != against]:
        last = found.shift(arm, against, by=by, window=max(1, steps // 4))
        last = last[last["step"] == last["step"].max()].drop(columns="step")
        shares = [f"{force}_share" for force in (*FORCES, "drift", "diffusion")]
        wanted = last["quantity"].isin([*shares, "kappa", "lam", "k", "loss"])
        typer.echo(f"\n{arm}, less {against}, last quarter:")
        typer.echo(last[wanted].to_string(index=False, na_rep="", float_format="{:.4g}".format))
        curves = found.shift(arm, against, by=by, window=max(1, steps // 50))
        for group in shift_groups(curves):
            axes = plot.wisca_shift(curves, group=group)
            words = group if isinstance(group, tuple) else () if group is None else (group,)
            label = "_".join([arm.replace(" ", "_"), *(["layer"] if by == "layer" else []), *map(str, words)])
            file = folder / f"{label}.png"
            axes[0].get_figure().savefig(file)
            plt.close(axes[0].get_figure())
    typer.echo(f"\n{folder}")
