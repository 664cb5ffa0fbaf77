"""`dta inspect`: what the rollouts of a file share, what that would save, and where sharing was lost."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dta_plugin.cli.terminal import printable
from dta_plugin.errors import InvalidInputError

if TYPE_CHECKING:
    from dta_plugin.cli.inspection import Inspection, Sharing
    from dta_plugin.cli.rollouts import RolloutFile

_EPILOG = """\
examples:
  dta inspect rollouts.jsonl.gz                              messages, as bytes: a first look, no tokenizer needed
  dta inspect rollouts.jsonl.gz --tokenizer Qwen/Qwen3-0.6B  real token counts
  dta inspect rollouts.jsonl.gz --per-turn                   one sequence per assistant turn, as agentic RL trains
  dta inspect ids.jsonl --group-by uid --model PATH          token ids, groups by uid, the cost of your own model
  dta inspect ids.jsonl --group 17 --forks 10 --svg 17.svg   one group in detail, with a picture
  dta inspect rollouts.jsonl.gz --html rollouts.html         a page to explore in a browser

FILE is JSONL, a JSON array, Parquet or Arrow (these two by pyarrow), also compressed by gzip, bzip2 or xz; a folder of
such files (TRL's completion logs, verl's dumps, a data set saved by `datasets`); or - for standard input.
a row is a list of token ids, a list of messages, or an object with
  prompt_ids and completion_ids          token ids (also: response_ids; prompt_token_ids and token_ids)
  input_ids, tokens or token_ids         token ids; zeros of an attention_mask are dropped
  messages or conversations              role, content, optional tool_calls; or ShareGPT's from and value
  prompt and completion(s)               texts, messages or token ids (also: response(s); input and output)
  chosen and rejected                    two rollouts, after prompt or what both begin with
  text                                   a text whose prompt is not known
null means absent; no row may be longer than 64 Mi characters
rewards are shown on the page: a number as reward, rewards, score, scores or total_reward, or a list of one per rollout
of the row; of an object its reward, score, total or only number; or the one key with reward or score in its name that
holds a number; --reward takes other keys, and adds several. A group is read from group, group_id, group_index, task_id,
prompt_id, uid, problem_id, example_id, question_id, query_id or qid; else rollouts with equal prompts are one
messages go through the tokenizer's chat template, if it has one; else each is rendered as
  <|role|>  newline  content  newline    and <|call|>name arguments, a line per tool call

--geometry takes layers, hidden, intermediate, heads, kv_heads, head_dim, vocab; a size left out is Qwen3-0.6B's:
  --geometry layers=36,hidden=2560,intermediate=9728,heads=32

reading the report:
  sharing        flat tokens / tree tokens: how often an average computed token is used
  FLOP ceiling   the largest speed-up sharing can give: linear layers, attention and LM head counted, nothing lost
  repeated       tokens after a fork that a sibling has too, in runs of about ten words (64 bytes, 16 tokens):
                 what was computed again only because the text before it differs

the page of --html is one file that loads nothing: groups, the tree of each with the text of every node, where siblings
part, rewards, search. It holds the rollouts' text: pass it on as you would the file. Long texts and many nodes are cut,
and the page says so
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="what rollouts share, and what that would save",
        description="Merge the rollouts of a file into prefix trees: what they share, what that would save, and where "
        "siblings part.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="rollouts: a file, a folder, or - for standard input; see below")
    parser.add_argument("--tokenizer", metavar="PATH", help="folder, tokenizer.json or hub name; default: bytes")
    parser.add_argument("--group-by", metavar="KEY", help="key of the group, or 'equal prompts'; default: found")
    parser.add_argument("--reward", metavar="KEYS", help="key of the reward, such as rewards.total; a,b: their sum")
    parser.add_argument(
        "--group", metavar="ID", help="list forks of this group only, and draw it alone; default: the largest"
    )
    parser.add_argument("--per-turn", action="store_true", help="one sequence per assistant turn")
    parser.add_argument("--limit", type=int, metavar="N", help="read the first N rollouts only")
    parser.add_argument("--forks", type=int, default=3, metavar="N", help="forks to list (default 3)")
    parser.add_argument("--model", metavar="PATH", help="folder, config.json or hub name: cost of this model")
    parser.add_argument(
        "--geometry",
        metavar="SIZES",
        help="cost of a model of these sizes, see below; default: Qwen3-0.6B's",
    )
    parser.add_argument("--svg", metavar="OUT", help="also write the picture as SVG")
    parser.add_argument("--html", metavar="OUT", help="also write a page to explore groups, trees and texts")
    parser.add_argument(
        "--html-mb", type=float, default=16.0, metavar="N", help="about N MB of text there (default 16)"
    )
    parser.add_argument(
        "--html-nodes", type=int, default=100_000, metavar="N", help="at most N nodes there (default 100000)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dta_plugin.cli.encoding import load_encoder
    from dta_plugin.cli.inspect_text import as_text
    from dta_plugin.cli.inspection import inspect_sequences
    from dta_plugin.cli.model_loading import cost_of
    from dta_plugin.cli.rollouts import per_turn_sequences, read_file, trajectory_sequences

    if args.forks < 0:
        raise InvalidInputError(f"--forks {args.forks}. Expected 0 or more.")
    _check_outputs(args)
    cost, model = cost_of(args.model, args.geometry)
    file = read_file(args.file, args.group_by, args.limit, args.reward)
    encoder = load_encoder(args.tokenizer)
    count, grouped_by, are_ids = len(file.rollouts), file.grouped_by, file.rollouts[0].tokens is not None
    rewards = _rewards(file)
    sequences = (per_turn_sequences if args.per_turn else trajectory_sequences)(file.rollouts, encoder)
    del file  # texts, of which only the tokens are needed
    decoder = None if are_ids and args.tokenizer is None else encoder
    run_length = 16 if are_ids else encoder.run_length
    found = inspect_sequences(sequences, cost, decoder, args.forks, run_length, args.group)
    about = {
        "file": "standard input" if args.file == "-" else Path(args.file).name,
        "rollouts": count,
        "unit": "assistant turn" if args.per_turn else "rollout",
        "grouped_by": grouped_by,
        "tokens": "token ids" if are_ids else encoder.description,
        "model": model,
        "rewards": rewards,
    }
    written = []
    if args.svg:
        from dta_plugin.tree.picture import draw_svg

        _write(args.svg, draw_svg(found.tree, f"group {printable(found.shown)}"), "--svg")
        written.append(args.svg)
    if args.html:
        from dta_plugin.cli.inspect_html import PageOptions, as_html

        options = PageOptions(args.html_nodes, args.html_mb, args.group)
        _write(args.html, as_html(found, sequences, about, decoder, run_length, options), "--html")
        written.append(args.html)
    if args.json:  # escapes every control character but DEL
        print(json.dumps(_as_json(found, about), indent=2).replace("\x7f", "\\u007f"))
    else:
        print("\n".join(as_text(found, about)))
        for path in written:
            print(f"\nwrote {printable(path)}")
    return 0


def _rewards(file: RolloutFile) -> dict[str, Any]:
    known = [rollout.reward for rollout in file.rollouts if rollout.reward is not None]
    return {
        "read_from": file.rewards.name or None,
        "rollouts": len(known),
        "mean": sum(value / len(known) for value in known) if known else None,
        "not_read": file.rewards.unread,
    }


def _check_outputs(args: argparse.Namespace) -> None:
    """Before anything is read. Raises InvalidInputError for what cannot be written, or limits that make no sense."""
    if args.html_nodes < 1 or not 0 <= args.html_mb < float("inf"):
        raise InvalidInputError(
            f"--html-nodes {args.html_nodes} --html-mb {args.html_mb}. Expected at least 1 node, and 0 MB or more."
        )
    for option, path in (("--svg", args.svg), ("--html", args.html)):
        if path is not None and (Path(path).is_dir() or not Path(path).parent.is_dir()):
            raise InvalidInputError(
                f"{path} cannot be written: {'a folder' if Path(path).is_dir() else 'its folder does not exist'}. "
                f"Expected a file name for {option}."
            )


def _write(path: str, content: str, option: str) -> None:
    try:
        Path(path).write_text(content, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InvalidInputError(
            f"{path} cannot be written: {error.strerror}. Expected a file name for {option}."
        ) from error


def _as_json(found: Inspection, about: dict[str, Any]) -> dict[str, Any]:
    def counts(sharing: Sharing) -> dict[str, Any]:
        return asdict(sharing) | {"ratio": sharing.ratio, "ceiling": sharing.ceiling}

    return about | {
        "within_groups": counts(found.within),
        "whole_file": counts(found.whole),
        "common_tokens": found.common,
        "first_forks": None if found.first_forks is None else asdict(found.first_forks),
        "forks": [{"group": item.group} | asdict(item.fork) for item in found.forks],
    }
