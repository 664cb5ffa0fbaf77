"""Every documented way to switch the plugin on, with stock TRL and real trainings; and off, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOTrainer, TrlParser

import dta_plugin
from dta_plugin.activation import enable_by_flags
from dta_plugin.adapters.trl import TreeGRPOConfig, TreeGRPOTrainer
from dta_plugin.adapters.trl.config import tree_config
from dta_plugin.errors import InvalidInputError
from tests.adapters.trl.launch import SCRIPTS, Result, Site, as_run
from tests.adapters.trl.support import assert_equal, enabled, identical, train

LAUNCHER = ("-m", "dta_plugin.run")
SCRIPT = SCRIPTS / "train.py"
ARGPARSE = SCRIPTS / "train_argparse.py"
METHODS = [
    (t, m) for t in (GRPOTrainer, RLOOTrainer) for m in ("_get_per_token_logps_and_entropies", "_prepare_inputs")
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site.build(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def stock(site: Site) -> Result:
    """The script as users run it without the plugin."""
    result = site.train("stock", "python", SCRIPT, *site.options())
    assert not any(module.startswith("dta_plugin") for module in result.modules)
    return result


def assert_switched_on(result: Result, stock: Result) -> None:
    assert result.code.parts[-3:] == ("adapters", "trl", "patch.py")
    seen = [argument for argument in result.arguments if argument.startswith(("--dta", "--use_dta"))]
    assert not seen, "the script must not see the plugin's options"
    assert_equal(stock.run, result.run)


def test_launcher_with_trl_parser_and_yaml(site: Site, stock: Result) -> None:
    """TrlParser refuses keys that no dataclass has, so the launcher has to take its own out of the YAML."""
    recipe = site.yaml("launcher", "dta_verify: first", "use_dta: false  # the command line wins")
    command = (*LAUNCHER, SCRIPT, "--use_dta=true", "--config", recipe, *site.data_options())
    result = site.train("launcher", "python", *command)
    assert_switched_on(result, stock)
    assert "call 0 verified against dense: log-probs agree to" in result.output
    assert "call 1 verified" not in result.output


@pytest.mark.long
def test_launcher_with_argparse(site: Site, stock: Result) -> None:
    """Flags before the script, with hyphens; the script imports its neighbour."""
    command = (*LAUNCHER, "--use-dta", "--dta-regroup=never", ARGPARSE, *site.data_options(), "--output", "argparse")
    assert_switched_on(site.train("argparse", "python", *command), stock)


@pytest.mark.long
def test_accelerate(site: Site, stock: Result) -> None:
    command = ("launch", *LAUNCHER, SCRIPT, "--use_dta", "true", *site.options())
    assert_switched_on(site.train("accelerate", "accelerate", *command), stock)


@pytest.mark.long
def test_torchrun(site: Site) -> None:
    command = ("--nproc_per_node", 2, "--standalone", *LAUNCHER, SCRIPT, "--use_dta", "true", *site.options())
    done = site.run("torchrun", *command, "--dta_verify", "every:2", "--result", site.result("torchrun"))
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [Result.read(site.result("torchrun"), done, rank) for rank in (0, 1)]
    assert all(rank.code.name == "patch.py" for rank in ranks)
    assert all(step["dta/dense_fallback"] == 0 for rank in ranks for step in rank.run.dta) and ranks[0].run.dta
    assert identical_weights(ranks[0], ranks[1])
    assert (done.stdout + done.stderr).count("call 2 verified against dense") == 1, "rank 0 speaks for all"


def identical_weights(a: Result, b: Result) -> bool:
    return all(torch.equal(weight, b.run.weights[name]) for name, weight in a.run.weights.items())


@pytest.mark.long
def test_trl_command(site: Site, stock: Result) -> None:
    """The unmodified `trl grpo` with three lines at the end of its YAML."""
    recipe = site.yaml(
        "trl",
        "module: dta_plugin.run",
        "use_dta: true",
        "dta_verify: first",
        model_name_or_path=str(site.folder / "model"),
        dtype="float32",
        dataset_name=str(site.folder / "data"),
        reward_funcs=["train.reward"],
        save_strategy="steps",
        save_steps=3,
        save_only_model=True,
    )
    (site.folder / "train.py").write_bytes(SCRIPT.read_bytes())  # `trl grpo` imports rewards from the current folder
    done = site.run("trl", "grpo", "--config", recipe)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "call 0 verified against dense" in done.stdout + done.stderr
    output = site.folder / "trl"
    logs = json.loads((output / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    weights = dict(AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32).named_parameters())
    assert_equal(stock.run, as_run(logs, stock.run.start, {name: w.detach() for name, w in weights.items()}))


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("trl", "grpo"), "unrecognized arguments: --use_dta"),
        (("python", SCRIPT, "--model", "m", "--data", "d", "--result", "r"), "Unknown arguments from config file"),
        (("python", "-m", "trl.scripts.grpo"), None),
    ],
    ids=["no_module_line", "own_script", "a_script_of_trl"],
)
def test_a_yaml_without_the_launcher(site: Site, command: tuple[object, ...], says: str | None) -> None:
    """What docs/trl.md says of it: an error of others, or stock training without a word."""
    entries = {"model_name_or_path": "model", "dataset_name": "data", "reward_funcs": ["train.reward"], "max_steps": 1}
    recipe = site.yaml("nobody", "use_dta: true", **(entries if command[-1] != "r" else {}))
    (site.folder / "train.py").write_bytes(SCRIPT.read_bytes())
    done = site.run(*command, "--config", recipe)
    said = done.stdout + done.stderr
    assert "dta: " not in said
    assert done.returncode != 0 and says in said if says else done.returncode == 0 and "'train_loss'" in said, said


@pytest.mark.long
def test_without_the_flag_nothing_changes(site: Site, stock: Result) -> None:
    result = site.train("absent", "python", *LAUNCHER, SCRIPT, *site.options())
    assert_stock(result, stock)
    assert result.arguments == [str(SCRIPT), *site.options(), "--result", str(site.result("absent"))]


def test_with_the_flag_off_nothing_changes(site: Site, stock: Result) -> None:
    flags = ("--use_dta", "false", "--dta_verify", "first")
    command = (*LAUNCHER, ARGPARSE, *site.data_options(), "--output", "off", *flags)
    assert_stock(site.train("off", "python", *command), stock)


def assert_stock(result: Result, stock: Result) -> None:
    assert result.code == stock.code and "dta_plugin" not in result.code.parts
    assert not any(module.startswith(("dta_plugin.adapters", "dta_plugin.activation")) for module in result.modules)
    assert identical(result.run, stock.run) and not any(result.run.dta)


def test_enable_in_a_script(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice, with other options: the methods are wrapped once, the last options count, and disable() restores them."""
    own = [trainer.__dict__[method] for trainer, method in METHODS]
    dense = train(model, tmp_path, GRPOTrainer, GRPOConfig)
    with enabled():
        first = [trainer.__dict__[method] for trainer, method in METHODS]
        dta_plugin.enable(min_saving=0.99, prune="never")
        assert all(trainer.__dict__[method] is was for (trainer, method), was in zip(METHODS, first, strict=True))
        assert not any(new is old for new, old in zip(first, own, strict=True))
        gated = train(model, tmp_path, GRPOTrainer, GRPOConfig)
        dta_plugin.enable(dta_plugin.TreeConfig())
        tree = train(model, tmp_path, GRPOTrainer, GRPOConfig)
    assert all(trainer.__dict__[method] is was for (trainer, method), was in zip(METHODS, own, strict=True))
    assert all(step["dta/dense_fallback"] == 1.0 for step in gated.dta) and gated.dta
    assert identical(gated, dense), "below min_saving the trainer's own method runs"
    assert_equal(dense, tree)


def test_enable_refuses(model: str) -> None:
    for options, complaint in (
        ({"verfy": "first"}, "Unknown option"),
        ({"verify": "often"}, "verify='often'. Expected"),
        ({"config": dta_plugin.TreeConfig(), "verify": "first"}, "both a TreeConfig and options"),
    ):
        with pytest.raises(InvalidInputError, match=complaint):
            dta_plugin.enable(**options)
    assert "dta_plugin" not in Path(GRPOTrainer._prepare_inputs.__code__.co_filename).parts


def test_parsers_offer_the_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The config class on the command line and in YAML."""
    common = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    parser = TrlParser(TreeGRPOConfig)
    (config,) = parser.parse_args_and_config([*common, "--dta_verify", "every:3", "--dta_min_saving", "0.2"])
    assert config.use_dta and config.dta_verify == "every:3" and config.dta_min_saving == 0.2
    assert config.dta_max_tree_tokens_per_chunk is None
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"use_dta": False, "dta_max_tree_tokens_per_chunk": 4096}))
    (config,) = parser.parse_args_and_config([*common, "--config", str(recipe)])
    assert not config.use_dta and config.dta_max_tree_tokens_per_chunk == 4096
    recipe.write_text("dta_verify: off")
    with pytest.raises(InvalidInputError, match=r"dta_verify=False. Expected .* quote it"):
        TrlParser(TreeGRPOConfig).parse_args_and_config([*common, "--config", str(recipe)])
    with pytest.raises(InvalidInputError, match=r"dta_backend='cuda'\. Expected one of auto, cpu"):
        TreeGRPOConfig(output_dir=str(tmp_path), dta_backend="cuda")
    with pytest.raises(SystemExit):
        parser.parse_args_and_config([*common, "--dta_backend", "cuda"])
    assert "invalid choice: 'cuda' (choose from 'auto', 'cpu'" in capsys.readouterr().err


def test_own_config_goes_before_enable(model: str, tmp_path: Path) -> None:
    """Two places that say different things: the closer one counts, and a warning tells."""
    stock = train(model, tmp_path, GRPOTrainer, GRPOConfig)
    with enabled(verify="first"):
        with pytest.warns(UserWarning, match="own config, use_dta=False, and not what the process was enabled with"):
            off = train(model, tmp_path, GRPOTrainer, TreeGRPOConfig, use_dta=False)
        with pytest.warns(UserWarning, match="Give the options in one place"):
            train(model, tmp_path, TreeGRPOTrainer, TreeGRPOConfig, max_steps=1)
    assert identical(stock, off)


def test_flags_go_before_own_config(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """What a command line names counts, what it does not is the config's; as with `use_dta=False` of a patched TRL."""
    stock = train(model, tmp_path, GRPOTrainer, GRPOConfig)
    with enabled(), caplog.at_level("INFO", logger="dta_plugin"):
        enable_by_flags(dta_plugin.TreeConfig(verify="first"), ["use_dta", "dta_verify"])
        tree = train(model, tmp_path, GRPOTrainer, TreeGRPOConfig, use_dta=False)
        merged = tree_config(
            TreeGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, dta_verify="off", dta_prune="never")
        )
        assert tree_config(GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)) is None, "it has no flag"
    assert_equal(stock, tree)
    assert caplog.text.count("verified against dense") == 1
    assert not any("own config" in str(warning.message) for warning in recwarn)
    assert merged == dta_plugin.TreeConfig(verify="first", prune="never")
    assert tree_config(TreeGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, use_dta=False)) is None, "flags are over"


def test_enable_configures_tree_trainers(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    with enabled(verify="first"), caplog.at_level("INFO", logger="dta_plugin"):
        train(model, tmp_path, TreeGRPOTrainer, GRPOConfig)
    assert caplog.text.count("verified against dense") == 1
    assert not any("own config" in str(warning.message) for warning in recwarn)
