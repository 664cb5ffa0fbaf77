"""`dta doctor`: would prefix-tree training run here, and with this model? Exit code 1 if not."""

from __future__ import annotations

import argparse
import platform
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dta_plugin import __version__
from dta_plugin.adapters.releases import TRANSFORMERS, TRL, VERL
from dta_plugin.cli.device_findings import devices
from dta_plugin.cli.findings import Finding, printed
from dta_plugin.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet
    from transformers import PreTrainedModel

_PACKAGES = ("torch", "triton", "transformers", "trl", "verl", "peft", "accelerate", "prefix_grouper")
_IF_INSTALLED = {"prefix_grouper": "another way to share prompts; do not switch on both"}
_NOT_INSTALLED = "not installed"
_NO_TRAINER = "nothing that trains is here: pip install 'dta-plugin[trl]', or 'dta-plugin[verl]' for verl"
_IF_MISSING = {"trl": "needed for training: pip install 'dta-plugin[trl]'"}

_EPILOG = """\
examples:
  dta doctor                            versions, devices, which attention backend runs here, and how fast
  dta doctor --model Qwen/Qwen3-0.6B    and whether this model can train with the tree
  dta doctor --model ./checkpoint       a folder or a config.json; large weights are not read
what it says of a model comes first; where that is not supported, nothing is measured

exit code: 0 if everything named is supported, 1 if something is not, 2 if the model cannot be found.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="would it run here, with this model?",
        description="Versions, devices and, for a model, what --use_dta would do with it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PATH", help="folder, config.json or hub name")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = model_findings(args.model) if args.model else []
    is_supported = all(finding.ok for finding in findings)
    if findings:  # the answer before what takes long
        print(printed(findings), flush=True)
        print(flush=True)
    found = [Finding("dta-plugin", __version__), *versions()]
    print(printed(found), flush=True)
    print(flush=True)
    findings += found
    if is_supported:
        found = devices()
        print(printed(found), end="\n\n")
        findings += found
    broken = [finding.name for finding in findings if not finding.ok]
    hint = "" if args.model else " To check a model: dta doctor --model PATH"
    print(f"Not supported: {', '.join(broken)}." if broken else f"Everything is supported.{hint}")
    return 1 if broken else 0


def versions() -> list[Finding]:
    """Python and the packages that matter, against the versions that this package declares."""
    ranges = _declared()
    findings = [Finding("python", platform.python_version())]
    for package in _PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            findings.append(Finding(package, _NOT_INSTALLED, _IF_MISSING.get(package, "")))
            continue
        allowed = ranges.get(package)
        if allowed is None:
            findings.append(Finding(package, version, _IF_INSTALLED.get(package, "")))
        else:
            note, ok = _judgement(package, version, allowed)
            bounds = ",".join(sorted(map(str, allowed), reverse=True))
            findings.append(Finding(package, version, f"{note} ({bounds})", ok))
    missing = {finding.name for finding in findings if finding.value == _NOT_INSTALLED}
    if missing >= {"trl", "verl"}:
        findings.append(Finding("trainer", _NOT_INSTALLED, _NO_TRAINER, ok=False))
    return findings


def _judgement(package: str, version: str, allowed: SpecifierSet) -> tuple[str, bool]:
    """What to say of an installed version, and whether it is supported. allowed: what this package declares."""
    known = next((releases for releases in (TRL, VERL, TRANSFORMERS) if releases.package == package), None)
    ok = allowed.contains(version, prereleases=True) if known is None else known.supports(version)
    if ok and known is not None and known.is_untested(version):
        return f"newer than tested, up to {known.newest_tested}", ok
    return "supported" if ok else "not supported", ok


def _declared() -> dict[str, SpecifierSet]:
    """Package -> version specifier of this package's dependencies and extras; empty if it is not installed."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata.requires("dta-plugin") or []]
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name: requirement.specifier for requirement in requirements if requirement.specifier}


def model_findings(path: str) -> list[Finding]:
    """What the model is made of, and whether it can run as a tree."""
    from dta_plugin.cli.model_loading import load_config, skeleton
    from dta_plugin.models.support import tree_obstacle

    load_config(path)  # a path without a model is wrong input, said by the caller
    try:
        model = skeleton(path)
    except InvalidInputError as error:
        return [Finding("model", path), Finding("--use_dta", "would stop", str(error), ok=False)]
    obstacle = tree_obstacle(model.train())
    answer = _probed(path) if obstacle is None else Finding("--use_dta", "would stop", obstacle, ok=False)
    return [Finding("model", type(model).__name__, path), *_architecture(model), answer]


def _probed(path: str) -> Finding:
    """What training would probe before its first tree: the model where it is small and here, else a tiny copy of it."""
    import torch

    from dta_plugin.cli.miniature import miniature
    from dta_plugin.cli.model_loading import fits_in_memory, load_config, load_model
    from dta_plugin.execution.probing.probe import latest_outcome, probe

    config, is_here = load_config(path), fits_in_memory(path)
    what = "its weights" if is_here else "a tiny copy with random weights"
    dtype, cpu = getattr(config, "dtype", None), torch.device("cpu")
    try:
        model = load_model(path, dtype, cpu)[0] if is_here else miniature(config)
        obstacles = probe(model, ["packed", "streamed"], "auto")
    except UnsupportedError as error:
        return Finding("--use_dta", "would stop", error.reason, ok=False)
    except Exception as error:  # whatever the model's class raises
        why = f"{what} cannot be probed ({type(error).__name__}: {error})"
        return Finding("--use_dta", "should work", f"{why}; training probes the model before its first tree")
    found = next((obstacle for obstacle in obstacles.values() if obstacle), None)
    if found is not None:
        return Finding("--use_dta", "would stop", f"{what}: {found}", ok=False)
    return Finding("--use_dta", "works", f"{what}, {latest_outcome(model)}")


def _architecture(model: PreTrainedModel) -> Iterator[Finding]:
    from dta_plugin.models.indexers import index_limit
    from dta_plugin.models.introspection import lm_head, model_cost
    from dta_plugin.models.layers import layer_types
    from dta_plugin.models.vision.support import images_obstacle
    from dta_plugin.models.vision.units import image_token_id

    config = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    active = model_cost(model).per_token / 2
    yield Finding("parameters", _count(parameters), f"{_count(active)} multiply every token, LM head aside")
    kinds = Counter(layer_types(config))
    window = getattr(config, "sliding_window", None)
    notes = [f"window {window}"] if "sliding_attention" in kinds and window else []
    notes += [] if (limit := index_limit(model)) is None else [f"rows of up to {limit} tokens (index_topk)"]
    layers = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
    yield Finding("layers", layers, ", ".join(notes))
    if image_token_id(model) is not None:
        obstacle = images_obstacle(model)
        each_once = "every distinct one goes through the tower once; probed on one of the first batch"
        yield Finding("images", "refused", obstacle) if obstacle else Finding("images", "should work", each_once)
    try:
        head = lm_head(model)
    except UnsupportedError as error:
        yield Finding("LM head", "none", str(error), ok=False)
        return
    tied = "tied" if getattr(config, "tie_word_embeddings", False) else "untied"
    cap = "no soft-cap" if head.softcap is None else f"soft-cap {head.softcap:g}"
    yield Finding("LM head", f"{config.vocab_size:,} tokens, {tied}", f"scale {head.scale:g}, {cap}")


def _count(number: float) -> str:
    """12345678 -> "12.3M"."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
