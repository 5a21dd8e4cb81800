"""The commands. Nothing heavy is imported before one of them runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paperworks.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="An archive of computer-vision papers in which every paper runs.\n\n"
    "Start here: paperworks compare ./my_images --papers unet,unetpp,attention_unet --budget 10m",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Data = Annotated[str, typer.Argument(help="A folder, an annotation file or pack:NAME.", metavar="DATA")]
PaperId = Annotated[str, typer.Argument(help="A paper's id; `paperworks list` names them.", metavar="ID")]
Out = Annotated[Path | None, typer.Option("--out", help="Where the result goes; a folder that does not exist yet.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Time to train, as 90s, 10m or 1h30m.")]
EpochsOption = Annotated[float | None, typer.Option("--epochs", help="Train so many passes over the data instead.")]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Train so many steps instead.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Change a field of the paper's configuration or recipe, as key=value; repeat for more.")
]
Precision = Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16.")]
Shortened = Annotated[
    str,
    typer.Option(
        "--precision",
        help="fp32, or bf16: about half the time on processors that compute in it; the difference on the first input is printed.",
    ),
]
Workers = Annotated[int, typer.Option("--workers", help="Processes that read and augment; 0 does it in this one.")]


def _print_json(content: Any) -> None:
    from paperworks.files import plain_json

    print(plain_json(content))


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def _settings(pairs: list[str] | None) -> dict[str, str]:
    out = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set {pair!r} is not of the form key=value")
        out[key] = value
    return out


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InputError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    return value


def _default_budget(budget: str | None, epochs: float | None, steps: int | None) -> str | None:
    return "10m" if budget is None and epochs is None and steps is None else budget


def _model(source: str, precision: str) -> Any:
    """A trained network, which says what another precision costs when it has seen its first input."""
    from paperworks.export.predict import load_model

    _choice("--precision", precision, ("fp32", "bf16"))

    def told(apart: float) -> None:
        _console().print(f"bf16: on the first input the outputs differ from float32's by {apart:.2%}", highlight=False)

    return load_model(source, precision=precision, told=told)  # type: ignore[arg-type]


def _open(task_name: str, source: str) -> Any:
    """Open a data set with a progress bar over its files."""
    from paperworks.cli.progress import counting
    from paperworks.tasks import task

    with counting(f"reading {source}") as progress:
        return task(task_name)(source, progress=progress)


@app.command("list")
def list_papers(
    task: Annotated[str | None, typer.Option("--task", help="Only papers of this task.")] = None,
    section: Annotated[str | None, typer.Option("--section", help="Only papers of this section.")] = None,
    verdict: Annotated[str | None, typer.Option("--verdict", help="deployable, buildable or watch.")] = None,
    as_json: Json = False,
) -> None:
    """The papers of the archive, with what is proven about each.

    Example: paperworks list --task segmentation --verdict deployable
    """
    from paperworks import papers
    from paperworks.study.audit import audit

    rows = []
    for card in papers.cards().values():
        if (task and card.task != task) or (section and card.section != section):
            continue
        found = audit(card.id, stale=False)
        if verdict is None or found["verdict"] == verdict:
            rows.append(
                {
                    "id": card.id,
                    "title": card.title,
                    "year": card.year,
                    "task": card.task,
                    "section": card.section,
                    "kind": card.kind,
                    "level": found["level"],
                    "claim": found["claim"],
                    "verdict": found["verdict"],
                    "methods": list(card.methods),
                }
            )
    if as_json:
        return _print_json(rows)
    width = max((len(r["id"]) for r in rows), default=0)
    for r in rows:
        print(f"{r['id']:<{width}}  {r['year']}  {r['task']}  level {r['level']}  {r['verdict']:<10}  {r['title']}")
    if not rows:
        print("no paper fits; `paperworks list` shows all", file=sys.stderr)


@app.command()
def show(paper: PaperId, language: Annotated[str, typer.Option("--lang", help="en or zh.")] = "en", as_json: Json = False) -> None:
    """A paper's card: idea, variants, evidence, verdict, how to use it.

    Example: paperworks show unet --lang zh
    """
    from paperworks import papers
    from paperworks.study.audit import audit

    _choice("--lang", language, ("en", "zh"))
    card, found = papers.card(paper), audit(paper)
    if as_json:
        facts = {k: (str(v) if isinstance(v, Path) else v) for k, v in vars(card).items()}
        return _print_json(facts | {"evidence": found})
    print(f"{card.title}\n{card.authors}, {card.venue} {card.year}" + (f", arXiv {card.arxiv}" if card.arxiv else ""))
    print(f"\n{card.idea[language]}\n")
    print(f"{'Claim' if language == 'en' else '主张'}: {card.claim[language]}")
    if card.headline:
        print(f"{'Reported' if language == 'en' else '论文结果'}: {card.headline[language]}")
    print(f"\n{'variant':<12} {'parameters':>12}")
    for name, variant in card.variants.items():
        print(f"{name:<12} {variant['params']:>12,}  {variant['about'][language]}")
    for name, method in card.methods.items():
        print(f"\npredict --with {name}: {method['about'][language]}")
    for name, layer in card.layers.items():
        print(f"\ntrain OTHER_PAPER --set {layer['slot']}={name}: {layer['about'][language]}")
    print(
        f"\nevidence: level {found['level']} of 4, claim {found['claim'] or 'not run'}, verdict {found['verdict']}"
        + (" (stale)" if found["stale"] else "")
    )
    if found["fidelity"] is not None:
        print(f"fidelity: relative error {found['fidelity']:.1e} against {found['against']}")
    for line in found["missing"]:
        print(f"missing: {line}")
    print(f"\nnote: {card.folder / ('note.md' if language == 'en' else 'note.zh.md')}")
    print(f"try:  paperworks train {paper} DATA --budget 10m")


@app.command()
def gallery(
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the site; one that is there is written again. Default: gallery.")
    ] = None,
    notes: Annotated[
        list[Path] | None,
        typer.Option("--notes", help="Markdown files of a reading group, or folders of them, shown beside ours; repeat for more."),
    ] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it, with a page on which trained runs are tried on pictures.")] = False,
    browser: Annotated[
        bool,
        typer.Option(
            "--browser",
            help="Put the networks of --runs into the site, to be tried without a server; fetches their runtime with npm, once.",
        ),
    ] = False,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--runs",
            help="What can be tried: a run folder, an exported .onnx file, or a folder in which runs lie; repeat for more. Default: runs.",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to serve at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8000,
) -> None:
    """The whole archive as a site that opens from the disk: notes beside code, claims, evidence, costs, in English and Chinese.

    Examples: paperworks gallery --out site;
    paperworks gallery --notes ./our_notes --out our_site;
    paperworks gallery --serve --runs runs/unet --runs runs/attention_unet;
    paperworks gallery --browser --runs runs/unet --out site
    """
    from paperworks.cli.progress import counting
    from paperworks.gallery.site import build

    group = None
    if notes:
        from paperworks.gallery.notes import read

        group = read(notes)
        for line in group.problems:
            print(f"left out: {line}", file=sys.stderr)

    def write(folder: Path) -> Path:
        with counting("writing pages") as progress:
            return build(folder, trying="server" if serve else "browser" if browser else "", notes=group, progress=progress)

    if serve and browser:
        raise InputError("--browser is for a site without a server; leave out --serve or --browser")
    if runs and not (serve or browser):
        raise InputError("--runs are tried on a served page or in the browser; add --serve or --browser")
    if browser:
        from paperworks.gallery.networks import Networks

        networks = Networks(runs or [Path("runs")])
        first = write(out or Path("gallery"))
        networks.write(first.parent)
        print(f"gallery {first}\n{', '.join(networks.keys)}: {first.with_name('try.html')}")
        return
    if not serve:
        print(f"gallery {write(out or Path('gallery'))}")
        return
    try:
        from paperworks.gallery.serve import serve as serve_gallery
    except ModuleNotFoundError as error:
        raise InputError(f"--serve needs {error.name}; install paperworks[serve]") from None
    serve_gallery(
        runs or [Path("runs")], write, out, host=host, port=port, ready=lambda address: print(f"{address}  (Ctrl-C ends it)", flush=True)
    )


@app.command()
def notes(
    paths: Annotated[list[Path], typer.Argument(help="Markdown files, or folders of them.", metavar="PATH...")],
    as_json: Json = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a page of what was recognised by what: REPORT.html.", metavar="REPORT")
    ] = None,
) -> None:
    """Read a reading group's Markdown notes: which paper each passage is about, and which papers the archive does not hold yet.

    Examples: paperworks notes weekly.md; paperworks notes ./our_notes --out report.html;
    paperworks gallery --notes ./our_notes --out site   shows them beside the archive's own
    """
    from paperworks.cli.progress import counting
    from paperworks.cli.tables import describe_notes
    from paperworks.gallery.notes import read

    if out and (out.suffix.lower() != ".html" or out.is_dir()):
        raise InputError(f"--out {out} is to be a page; give a file whose name ends in .html")
    with counting("reading notes") as progress:
        found = read(paths, progress=progress)
    if out:
        from paperworks.gallery.site import write_report

        write_report(found, out)
    for line in found.problems:
        print(f"left out: {line}", file=sys.stderr)
    if as_json:
        return _print_json(found.content())
    describe_notes(found)
    if out:
        print(f"report {out}")


@app.command()
def data(
    path: Data,
    task: Annotated[str | None, typer.Option("--task", help="Read it as data of this task; default: what it looks like.")] = None,
    as_json: Json = False,
) -> None:
    """What is in a folder: task, counts, sizes, classes, and every problem by file name.

    Examples: paperworks data ./my_images; paperworks data pack:cardiac_mr --json
    """
    from paperworks import tasks
    from paperworks.cli.progress import counting
    from paperworks.data.packs import source_path

    kind = tasks.task(task or tasks.guess(source_path(path)))
    with counting(f"reading {path}") as progress:
        found = kind.inspect(path, progress=progress)
    if as_json:
        return _print_json(found)
    from paperworks.cli.tables import describe_data

    describe_data(found)


@app.command()
def train(
    paper: PaperId,
    data: Data,
    out: Out = None,
    variant: Annotated[str, typer.Option("--variant", help="A named variant; auto takes the largest that the budget can train.")] = "auto",
    budget: BudgetOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    settings: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Decides initial weights, order and augmentation.")] = 0,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from the published weights of the variant.")] = False,
    encoder: Annotated[
        Path | None, typer.Option("--encoder", help="Start from what the network of this run folder has learnt to see.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Train on the first so many images only.")] = None,
    precision: Precision = "auto",
    workers: Workers = 0,
    devices: Annotated[int, typer.Option("--devices", help="GPUs, or processes on CPU.")] = 1,
    nodes: Annotated[int, typer.Option("--nodes", help="Machines, under torchrun or SLURM.")] = 1,
    ray: Annotated[
        str, typer.Option("--ray", metavar="ADDRESS", help="Ray cluster, or local: a search trains its candidates there, side by side.")
    ] = "",
) -> None:
    """Train a paper on your data; leaves a run folder with the model. Without a budget: 10 minutes.

    Examples: paperworks train unet ./my_images --budget 10m;
    paperworks train unetpp pack:nuclei --variant small --epochs 20 --set lr=1e-3 --out runs/nuclei
    """
    from paperworks import papers
    from paperworks.cli.progress import TrainingBar
    from paperworks.train.api import fit

    _choice("--precision", precision, ("auto", "fp32", "bf16"))
    out = out or Path("runs") / f"{paper}_{Path(data.removeprefix('pack:')).stem}"
    opened = _open(papers.card(paper).task, data)
    with TrainingBar(f"{paper}") as bar:
        run = fit(
            paper,
            data,
            out,
            variant=variant,
            budget=_default_budget(budget, epochs, steps),
            epochs=epochs,
            steps=steps,
            seed=seed,
            resume=resume,
            workers=workers,
            devices=devices,
            nodes=nodes,
            precision=precision,
            limit=limit,
            pretrained=pretrained,
            encoder=encoder or "",
            ray=ray,
            opened=opened,
            listener=bar,
            settings=_settings(settings),
        )
    from paperworks.cli.tables import metrics_table

    if not run.finished:  # a process of several: the first one has written everything
        return
    metrics_table(run.record["metrics"])
    print(f"model    {run.folder / 'model.safetensors'}\npictures {run.folder / 'pictures' / 'final.png'}")
    print(f"predict  paperworks predict {run.folder} {opened.noun[1].upper()} --out DIR")


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help="A run folder or an exported .onnx file.", metavar="RUN")],
    data: Data,
    refiner: Annotated[str | None, typer.Option("--with", help="An inference method that refines the predictions, as dense_crf.")] = None,
    settings: Set = None,
    split: Annotated[str, typer.Option("--split", help="val or train.")] = "val",
    precision: Shortened = "fp32",
    as_json: Json = False,
) -> None:
    """Measure a trained model on labelled data, besides the baselines.

    Example: paperworks evaluate runs/unet ./more_images --json
    """
    from paperworks.cli.progress import counting
    from paperworks.export.predict import build_refiner

    _choice("--split", split, ("val", "train"))
    model = _model(run, precision)
    refine = build_refiner(refiner, _settings(settings)) if refiner else None
    opened = _open(model.spec.task, data)
    opened.check(model.spec)
    items = opened.val if split == "val" else opened.train
    predict = opened.predictor(model.forward, model.spec, model.grid)
    refined = (lambda image: refine(image, predict(image))) if refine else predict
    with counting("predicting") as progress:
        metrics, per_item = opened.evaluate(refined, items, progress=progress)
    baselines = {name: opened.evaluate(predict, items)[0] for name, predict in opened.baselines().items()}
    if as_json:
        return _print_json({"metrics": metrics, "per_item": per_item, "baselines": baselines})
    from paperworks.cli.tables import comparison_table

    comparison_table({Path(run).name: metrics, **baselines}, opened.metric)


@app.command()
def predict(
    run: Annotated[str, typer.Argument(help="A run folder or an exported .onnx file.", metavar="RUN")],
    inputs: Annotated[list[Path], typer.Argument(help="Files or folders of files.", metavar="INPUT...")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the predictions.")],
    refiner: Annotated[str | None, typer.Option("--with", help="An inference method that refines the predictions, as dense_crf.")] = None,
    settings: Set = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write each class's probability as a float16 TIFF.")] = False,
    overlays: Annotated[bool, typer.Option("--overlays", help="Also write pictures of the predictions.")] = False,
    window: Annotated[
        int, typer.Option("--window", help="Images with a longer side are predicted in overlapping tiles of this size.")
    ] = 1024,
    overlap: Annotated[float, typer.Option("--overlap", help="Share of a tile that its neighbour covers too.")] = 0.25,
    resume: Annotated[bool, typer.Option("--resume", help="Skip files whose prediction is there.")] = False,
    shard: Annotated[
        str, typer.Option("--shard", help="Only this part of the files, as 2/8. A part that writes a table needs its own --out.")
    ] = "1/1",
    precision: Shortened = "fp32",
) -> None:
    """Predict files of any size. Masks keep the images' names and sizes, and their values are class indexes; other tasks write what is
    usual there.

    Examples: paperworks predict runs/unet ./new_images --out masks;
    paperworks predict unet.onnx scan.tif --out masks --with dense_crf --set sigma_colour=5
    """
    from paperworks.cli.progress import counting
    from paperworks.export.predict import build_refiner, predict_files
    from paperworks.tasks.contract import Options

    model = _model(run, precision)
    refine = build_refiner(refiner, _settings(settings)) if refiner else None
    if settings and not refiner:
        raise InputError("--set changes an inference method here; name it with --with")
    try:
        part, parts = map(int, shard.split("/"))
    except ValueError:
        raise InputError(f"--shard {shard!r} is no part such as 2/8") from None
    options = Options(
        refine=refine, probabilities=probabilities, overlays=overlays, window=window, overlap=overlap, resume=resume, shard=(part, parts)
    )
    with counting("predicting") as progress:
        written = predict_files(model, inputs, out, options, progress=progress)
    print(f"{len(written)} {'file' if len(written) == 1 else 'files'} in {out}")
    if model.spec.task == "segmentation":
        print("class indexes: " + ", ".join(f"{i} {name}" for i, name in enumerate(model.spec.classes)))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="Run folder of a paper on generation.", metavar="RUN")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the images.")],
    n: Annotated[int, typer.Option("--n", help="How many images; 0 with --interpolate alone.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same images.")] = 0,
    interpolate: Annotated[
        tuple[Path, Path] | None, typer.Option("--interpolate", help="Two images; the way between them is drawn.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Images on that way, its ends among them.")] = 9,
    against: Annotated[str | None, typer.Option("--against", help="Data to measure the Frechet distance of the samples to.")] = None,
) -> None:
    """Draw new images from a trained network, and the way from one image to another.

    Examples: paperworks sample runs/vae --n 64 --out samples;
    paperworks sample runs/vae --n 0 --interpolate a.png b.png --out between
    """
    from paperworks.export.sample import sample_files

    data = _open("generation", against) if against else None
    written = sample_files(run, out, n=n, seed=seed, interpolate=interpolate, steps=steps, against=data)
    for path in written:
        if path.parent == out:
            print(path)


@app.command()
def explain(
    run: Annotated[str, typer.Argument(help="A run folder.", metavar="RUN")],
    inputs: Annotated[list[Path], typer.Argument(help="Images or folders of images.", metavar="INPUT...")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")],
    name: Annotated[str | None, typer.Option("--with", help="What explains; default: the first that a paper offers for the task.")] = None,
    settings: Set = None,
    classes: Annotated[str, typer.Option("--classes", help="Classes to explain, separated by commas; default: the most probable.")] = "",
    as_json: Json = False,
) -> None:
    """Show where in an image a trained network sees what it says.

    Example: paperworks explain runs/convnext ./photos --out why --classes cat,dog
    """
    from paperworks.cli.progress import counting
    from paperworks.export.explain import explain_files

    asked = [c.strip() for c in classes.split(",") if c.strip()]
    with counting("explaining") as progress:
        found = explain_files(run, inputs, out, name=name, settings=_settings(settings), classes=asked, progress=progress)
    if as_json:
        return _print_json(found)
    print(f"{len(found)} {'picture' if len(found) == 1 else 'pictures'} in {out}")


@app.command()
def acquire(
    run: Annotated[str, typer.Argument(help="A run folder; its network has dropout.", metavar="RUN")],
    inputs: Annotated[list[Path], typer.Argument(help="Unlabelled images or folders of them.", metavar="INPUT...")],
    out: Annotated[Path, typer.Option("--out", help="Folder for acquire.csv and acquire.png.")],
    size: Annotated[int, typer.Option("--n", help="How many to label next.")] = 10,
    name: Annotated[str | None, typer.Option("--with", help="What chooses; default: the first that a paper offers.")] = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Which unlabelled images to label next: those whose labels, taken together, tell most.

    Example: paperworks acquire runs/first ./unlabelled --n 10 --out next
    """
    from paperworks.cli.progress import counting
    from paperworks.export.acquire import acquire_files

    with counting("asking") as progress:
        rows = acquire_files(run, inputs, out, size=size, name=name, settings=_settings(settings), progress=progress)
    if as_json:
        return _print_json(rows)
    print(f"{len(rows)} to label, in order: {out / 'acquire.csv'}")


@app.command()
def compare(
    data: Data,
    names: Annotated[str, typer.Option("--papers", help="Ids of papers of one task, separated by commas.")],
    budget: BudgetOption = None,
    epochs: EpochsOption = None,
    steps: StepsOption = None,
    out: Out = None,
    variant: Annotated[str, typer.Option("--variant", help="For all papers; auto measures step times and chooses.")] = "auto",
    seeds: Annotated[str, typer.Option("--seeds", help="One training for each, as 0,1,2.")] = "0",
    precision: Precision = "auto",
    halving: Annotated[
        bool,
        typer.Option(
            "--halving",
            help="Try all papers on a part of the budget, and give all of it to the best only: of nine papers a third of the steps.",
        ),
    ] = False,
    ray: Annotated[str, typer.Option("--ray", help="Train the papers side by side on this Ray cluster: HOST:PORT, auto or local.")] = "",
    as_json: Json = False,
) -> None:
    """Train several papers on your data under the same budget: a report, a recommendation, a trained model.

    The budget is each paper's. An interrupted comparison goes on when the command is repeated.

    Example: paperworks compare ./my_images --papers unet,unetpp,attention_unet,deeplab_crf --budget 10m --halving
    """
    from paperworks import papers
    from paperworks.cli.progress import ComparisonBars
    from paperworks.study.compare import compare as run_comparison

    _choice("--precision", precision, ("auto", "fp32", "bf16"))
    ids = [name.strip() for name in names.split(",") if name.strip()]
    cards = [papers.card(name) for name in ids]
    if not cards:
        raise InputError("--papers names no paper; `paperworks list` shows them")
    try:
        seed_list = [int(s) for s in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {seeds!r} is no list of whole numbers such as 0,1,2") from None
    out = out or Path("runs") / f"compare_{Path(data.removeprefix('pack:')).stem}"
    opened = _open(cards[0].task, data)
    with ComparisonBars() as watcher:
        result = run_comparison(
            data,
            ids,
            out,
            budget=_default_budget(budget, epochs, steps),
            epochs=epochs,
            steps=steps,
            variant=variant,
            seeds=seed_list,
            precision=precision,
            halving=halving,
            ray=ray,
            opened=opened,
            watcher=watcher,
        )
    if as_json:
        return _print_json(result)
    from paperworks.cli.tables import compare_table

    compare_table(result, out)


@app.command()
def claim(
    paper: PaperId,
    out: Out = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the outcome in results/.")] = False,
    as_json: Json = False,
) -> None:
    """Try a paper's claim as a small experiment: every arm, every seed, judged by the rule in the paper's claim.py.

    Example: paperworks claim unet
    """
    from paperworks.cli.progress import ComparisonBars
    from paperworks.study.claim import try_claim

    out = out or Path("runs") / f"claim_{paper}"
    with ComparisonBars() as watcher:
        outcome = try_claim(paper, out, record=record, listener=lambda name: watcher.paper(name, 0), told=watcher.note)
    if as_json:
        return _print_json(outcome)
    from paperworks.cli.tables import claim_table

    claim_table(outcome, out)


@app.command()
def measure(
    subject: Annotated[str, typer.Argument(help="A paper's id or a run folder.", metavar="ID|RUN")],
    variant: Annotated[str | None, typer.Option("--variant", help="Of a paper; default: its cheapest practical one.")] = None,
    size: Annotated[int | None, typer.Option("--size", help="Height and width of the image; default: 256, or the run's data.")] = None,
    channels: Annotated[int, typer.Option("--channels", help="Of the image, for a paper.")] = 3,
    classes: Annotated[int, typer.Option("--classes", help="For a paper.")] = 2,
    as_json: Json = False,
) -> None:
    """Parameters, operations, latency and memory.

    Examples: paperworks measure unet --variant paper --size 388; paperworks measure runs/unet
    """
    from paperworks.study.measure import measure_subject

    found = measure_subject(subject, variant=variant, size=size, channels=channels, classes=classes)
    if as_json:
        return _print_json(found)
    from paperworks.cli.tables import cost_table

    cost_table(found)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="A run folder.", metavar="RUN")],
    out: Annotated[Path, typer.Option("--out", help="The .onnx file.")],
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits; quality and speed before and after are measured.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="Where the run's data lies now, if it moved.")] = None,
    as_json: Json = False,
) -> None:
    """Export a run to ONNX; it is reported as done only after its outputs equal the original's.

    Example: paperworks export runs/unet --out unet.onnx
    """
    from paperworks.export.onnx import export_run
    from paperworks.train.run import Run

    loaded = Run.load(run)
    report = export_run(loaded, out, data=_open(loaded.spec.task, data or loaded.record["data"]["source"]), int8=int8)
    if as_json:
        return _print_json(report)
    from paperworks.cli.tables import export_table

    export_table(report, out)


@app.command()
def audit(
    papers_: Annotated[list[str] | None, typer.Argument(help="Ids; default: all.", metavar="[ID...]")] = None,
    record: Annotated[bool, typer.Option("--record", help="Check levels 1 and 4 now and keep the evidence in results/.")] = False,
    costs: Annotated[bool, typer.Option("--costs", help="Measure the costs of level 4 on this machine and keep them in results/.")] = False,
    budget: Annotated[str, typer.Option("--budget", help="Training time of --record.")] = "60s",
    as_json: Json = False,
) -> None:
    """The four levels of evidence of each paper: builds, faithful, claimed, usable.

    Example: paperworks audit unet unetpp --json
    """
    from paperworks import papers
    from paperworks.study.audit import audit as look

    ids = papers_ or list(papers.cards())
    for name in ids:
        papers.card(name)
    if record:
        import tempfile

        from paperworks.cli.progress import TrainingBar
        from paperworks.study.audit import record_builds, record_usable
        from paperworks.train.budget import parse_duration

        for name in ids:
            record_builds(name)
            with tempfile.TemporaryDirectory() as folder, TrainingBar(name) as bar:
                record_usable(name, Path(folder), budget=parse_duration(budget), listener=bar)
    if costs:
        from paperworks.study.audit import record_costs

        refused = []
        for name in ids:
            with _console().status(name) as status:
                try:
                    record_costs(name, progress=lambda what, name=name: status.update(f"{name}: {what}"))
                except InputError as error:
                    refused.append(str(error))
        if refused:
            raise InputError("; ".join(refused))
    found = [look(name) for name in ids]
    if as_json:
        return _print_json(found)
    from paperworks.cli.tables import audit_table

    audit_table(found)


@app.command()
def new(
    paper: Annotated[str, typer.Argument(help="Id of the new paper: lower case, as unetpp.", metavar="ID")],
    task: Annotated[str, typer.Option("--task", help="The task whose contract it keeps.")],
    section: Annotated[str, typer.Option("--section", help="Section of the archive; default: the task's.")] = "",
) -> None:
    """Make a folder for a new paper; its tests fail with clear messages until it is filled.

    Example: paperworks new my_paper --task segmentation
    """
    from paperworks.study.new import make_paper

    for path in make_paper(paper, task, section or task):
        print(path)
    print(f"fill these in, then: pytest tests/papers tests/contract -k {paper}")


def version(value: bool) -> None:
    """Print the version and leave."""
    if value:
        from paperworks import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def root(_: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False) -> None:
    """Options of the program itself."""
