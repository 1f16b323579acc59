# SPDX-License-Identifier: Apache-2.0
"""The training loop: what it does to a model, what it leaves on disk, how it goes on after a kill."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ctxfast.training.loop.batches import Batches
from ctxfast.training.loop.task import BaseTask
from ctxfast.training.loop.train import LoopConfig, TrainingDiverged, stream, train

HERE = Path(__file__).parent


class Line(BaseTask):
    """Fits y = x w with dropout on x; remembers how many batches' losses it took."""

    def __init__(self, seed: int = 0, examples: int = 37, batch_size: int = 4) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(examples, 5, generator=draw)
        self.y = self.x @ torch.randn(5, 1, generator=draw)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.batches = Batches(examples, batch_size, seed)
        self.losses = 0

    def batch(self, step: int, rank: int, ranks: int) -> dict:
        rows = self.batches(step, rank, ranks)
        return {"x": self.x[rows], "y": self.y[rows]}

    def weight(self, batch: dict) -> float:
        return len(batch["x"])

    def size(self, batch: dict) -> int:
        return 10 * len(batch["x"])

    def loss(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        self.losses += 1
        difference = model(batch["x"]) - batch["y"]
        return difference.square().mean(), {"absolute": difference.abs().mean()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        return {"error": (model(self.x) - self.y).square().mean().item()}

    def state_dict(self) -> dict:
        return {"losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        self.losses = state["losses"]

    def save(self, directory: Path) -> None:
        torch.save(self.model.state_dict(), directory / "model.pt")


def config(**changed) -> LoopConfig:
    return LoopConfig(
        **{"steps": 20, "learning_rate": 0.05, "log_every": 5, "save_every": 4, "parallel": "no"} | changed
    )


def final(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "final" / "model.pt")


def test_it_trains_and_leaves_a_whole_run(tmp_path) -> None:
    shown = []
    report = train(
        Line(),
        config(eval_every=10, best="-error", warmup_steps=2),
        tmp_path / "run",
        show=lambda step, steps, figures: shown.append((step, steps, sorted(figures))),
    )
    assert report.step == 20 and report.resumed == 0
    evaluations = [line for line in report.log if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [10, 20]
    assert evaluations[-1]["error"] < evaluations[0]["error"] < 5
    assert report.best["step"] == 20 and report.best["figures"] == report.figures
    reports = [line for line in report.log if line["kind"] == "train"]
    assert [line["step"] for line in reports] == [5, 10, 15, 20]
    assert {"loss", "absolute", "learning_rate", "steps_per_second", "tokens_per_second"} <= set(reports[0])
    assert shown[0] == (5, 20, ["absolute", "learning_rate", "loss", "steps_per_second", "tokens_per_second"])
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == [
        "best",
        "checkpoint-00000016.pt",
        "checkpoint-00000020.pt",
        "config.json",
        "final",
        "lock",
        "log.jsonl",
    ]
    assert json.loads((tmp_path / "run" / "final" / "training.json").read_text())["step"] == 20
    again = train(Line(), config(eval_every=10, best="-error", warmup_steps=2), tmp_path / "run")
    assert again.step == 20 and again.resumed == 20 and again.figures == report.figures and again.log == report.log


def test_it_tells_of_every_step(tmp_path, caplog) -> None:
    """Steps, what was read, the mean loss since the last report; without ``show`` reports go to the logger."""
    ticks = []
    caplog.set_level("INFO", "ctxfast")
    report = train(Line(examples=7), config(accumulate=2), tmp_path / "run", tick=ticks.append)
    assert [(tick.step, tick.steps, tick.unit) for tick in ticks] == [(step, 20, "tokens") for step in range(1, 21)]
    assert {tick.size for tick in ticks} == {70}  # batches of 4 and 3
    reports = {line["step"]: line["loss"] for line in report.log if line["kind"] == "train"}
    assert {tick.step: tick.loss for tick in ticks if tick.step in reports} == pytest.approx(reports)
    said = [record.getMessage() for record in caplog.records if record.name == "ctxfast.training.loop.train"]
    assert len(said) == 5 and said[0].startswith("step 5 of 20: loss ") and said[-1].startswith("step 20 of 20: error ")


@pytest.mark.parametrize("optimizer", ["adamw", "bert_adam", "lamb", "adagrad"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_break_changes_no_bit(tmp_path, optimizer: str, accumulate: int) -> None:
    options = dict(optimizer=optimizer, accumulate=accumulate, warmup_steps=3, eval_every=8, best="-error")
    whole = Line()
    train(whole, config(**options), tmp_path / "whole")

    class Dies(Line):
        def loss(self, model, batch):
            if self.losses == 11 * accumulate:
                raise KeyboardInterrupt
            return super().loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(Dies(), config(**options), tmp_path / "broken")
    assert not (tmp_path / "broken" / "final").exists()
    rest = Line()
    report = train(rest, config(**options), tmp_path / "broken")
    assert report.resumed == 8 and rest.losses == whole.losses == 20 * accumulate
    one, other = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)

    def log(name: str) -> list[dict]:
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if not key.endswith("_per_second")} for line in lines]

    assert log("whole") == log("broken")


def test_what_is_drawn_depends_on_seed_step_and_process(tmp_path) -> None:
    weights = []
    for seed in (0, 1, 1 << 19, 1 << 32):  # dropout alone tells these runs apart
        train(Line(), config(steps=3, seed=seed), tmp_path / str(seed))
        weights.append(final(tmp_path / str(seed))["1.weight"])
    assert not any(torch.equal(one, other) for i, one in enumerate(weights) for other in weights[:i])
    drawn = set()
    for seed, step, rank in ((0, 0, 0), (0, 1, 0), (0, 4096, 0), (0, 8192, 0), (0, 0, 1), (1, 0, 0), (2**63 - 1, 0, 0)):
        torch.manual_seed(stream(seed, step, rank))
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 7


class Signalled(Line):
    """Gets a signal in its eighth step."""

    signal = signal.SIGINT

    def loss(self, model, batch):
        if self.losses == 7:
            os.kill(os.getpid(), self.signal)
        return super().loss(model, batch)


@pytest.mark.parametrize("kind", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path, kind: str) -> None:
    options = {"steps": 20, "learning_rate": 0.05, "log_every": 5, "save_every": 100, "parallel": "no"}
    train(Line(), LoopConfig(**options), tmp_path / "whole")
    script = (
        "import signal, sys; from test_loop import LoopConfig, Signalled, train\n"
        # A shell that starts `make test` in the background has it ignored, which the loop would leave so.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"Signalled.signal = signal.{kind}\n"
        f"train(Signalled(), LoopConfig(**{options}), sys.argv[1])"
    )
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "broken")],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": path},
    )
    # As a shell or a scheduler expects it: ended by the signal.
    assert done.returncode == -getattr(signal, kind), done.stderr
    assert [entry.name for entry in (tmp_path / "broken").glob("checkpoint-*")] == ["checkpoint-00000008.pt"]
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    report = train(Line(), LoopConfig(**options), tmp_path / "broken")
    assert before == {number: signal.getsignal(number) for number in before}
    assert report.resumed == 8 and [line["step"] for line in report.log if line["kind"] == "train"] == [5, 10, 15, 20]
    one, other = final(tmp_path / "whole"), final(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_accumulation_is_one_large_batch(tmp_path) -> None:
    """Micro-batches of unequal size count by their examples."""

    class Plain(Line):
        def __init__(self, batch_size: int) -> None:
            super().__init__(examples=37, batch_size=batch_size)
            self.model[0].p = 0.0
            self.batches = Batches(37, batch_size, is_shuffled=False)

    small = dict(steps=6, optimizer="adagrad", max_grad_norm=None, weight_decay=0.0)
    train(Plain(37), config(**small), tmp_path / "whole")
    train(Plain(10), config(**small, accumulate=4), tmp_path / "parts")
    one, other = final(tmp_path / "whole"), final(tmp_path / "parts")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


def test_bf16(tmp_path) -> None:
    report = train(Line(), config(amp="bf16"), tmp_path / "run")
    assert report.figures["error"] < 5
    with pytest.raises(ValueError, match="amp is 'fp16' on a CPU; expected 'bf16' or 'no'"):
        train(Line(), config(amp="fp16", device="cpu"), tmp_path / "other")


def test_a_loss_that_is_no_number_stops_it(tmp_path) -> None:
    class Breaks(Line):
        def loss(self, model, batch):
            loss, figures = super().loss(model, batch)
            return (loss * math.nan if self.losses == 11 else loss), figures

    with pytest.raises(TrainingDiverged, match=r"not finite at step 11 .* checkpoint is .*checkpoint-00000008.pt"):
        train(Breaks(), config(), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "checkpoint-00000008.pt")
    assert all(value.isfinite().all() for value in state["model"].values())
    with pytest.raises(TrainingDiverged, match="no checkpoint was written before"):
        train(Breaks(), config(save_every=100), tmp_path / "other")


def test_a_figure_that_is_no_number_is_never_the_best_for_long(tmp_path) -> None:
    class Undefined(Line):
        figures = iter((float("nan"), 2.0, float("nan"), 1.0, 0.5))

        def evaluate(self, model: nn.Module) -> dict[str, float]:
            return {"f1": next(self.figures)}

    report = train(Undefined(), config(eval_every=4, best="f1"), tmp_path)
    assert report.best == {"step": 8, "figures": {"f1": 2.0}}
    assert json.loads((tmp_path / "best" / "training.json").read_text())["step"] == 8


def test_a_directory_of_another_run_is_refused(tmp_path) -> None:
    run = tmp_path / "run"
    train(Line(), config(), run, settings={"data": "a.txt", "model": {"size": 8}})
    with pytest.raises(ValueError, match="configuration: settings.data was 'a.txt' and is 'b.txt' now"):
        train(Line(), config(), run, settings={"data": "b.txt", "model": {"size": 8}})
    with pytest.raises(ValueError, match="loop.learning_rate was 0.05 and is 0.1 now"):
        train(Line(), config(learning_rate=0.1), run, settings={"data": "a.txt", "model": {"size": 8}})
    with pytest.raises(ValueError, match="holds a run already"):
        train(Line(), config(), run, resume=False)
    train(Line(), config(log_every=7), run, settings={"data": "a.txt", "model": {"size": 8}})  # changes no result
    report = train(Line(), config(steps=3), run, overwrite=True)
    assert report.step == 3 and report.resumed == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds thesis.tex; expected an empty directory"):
            train(Line(), config(), tmp_path / "theirs", overwrite=overwrite)
    with pytest.raises(ValueError, match="is a file; expected a directory"):
        train(Line(), config(), tmp_path / "theirs" / "thesis.tex")


def test_hidden_files_and_models_of_others_are_left_alone(tmp_path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main")
    for name in (".checkpoint-00000004.pt.ctxfast/new.pt", ".best.ctxfast/old"):
        (tmp_path / name).mkdir(parents=True)
    train(Line(), config(steps=3), tmp_path)
    train(Line(), config(steps=3), tmp_path, overwrite=True)
    assert (tmp_path / ".git" / "HEAD").read_text() == "ref: refs/heads/main"
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".git"]
    other = tmp_path / "other"
    (other / "best").mkdir(parents=True)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds best and no config.json; expected an empty directory"):
            train(Line(), config(), other, overwrite=overwrite)
    assert list(other.iterdir()) == [other / "best"]


def test_reports_of_a_run_killed_before_its_first_checkpoint_are_made_anew(tmp_path) -> None:
    class Dies(Line):
        def loss(self, model, batch):
            if self.losses == 11:
                raise KeyboardInterrupt
            return super().loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(Dies(), config(save_every=100), tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 11, "ki')  # killed while it wrote
    report = train(Line(), config(save_every=100), tmp_path)
    assert [line["step"] for line in report.log if line["kind"] == "train"] == [5, 10, 15, 20]


def test_a_directory_in_use_is_refused(tmp_path) -> None:
    class Nested(Line):
        def loss(self, model, batch):
            train(Line(), config(), tmp_path / "run")
            raise AssertionError("two runs in one directory")

    with pytest.raises(RuntimeError, match="another process trains in"):
        train(Nested(), config(), tmp_path / "run")


def test_a_damaged_checkpoint_is_named(tmp_path) -> None:
    class Dies(Line):
        def loss(self, model, batch):
            if self.losses == 9:
                raise KeyboardInterrupt
            return super().loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(Dies(), config(), tmp_path)
    last = tmp_path / "checkpoint-00000008.pt"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint-00000008.pt does not read .* Remove it"):
        train(Line(), config(), tmp_path)
    last.unlink()
    assert train(Line(), config(), tmp_path).resumed == 4


@pytest.mark.parametrize("text", ["{", "[]", '{"loop": {}}'])
def test_a_damaged_config_is_named(tmp_path, text) -> None:
    train(Line(), config(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json is not what a run was started with .* overwrite to start anew"):
        train(Line(), config(), tmp_path)
    assert train(Line(), config(), tmp_path, overwrite=True).step == 20


def test_a_failed_save_leaves_nothing(tmp_path) -> None:
    class Full(Line):
        def save(self, directory: Path) -> None:
            (directory / "half").write_text("of it")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        train(Full(), config(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-00000016.pt",
        "checkpoint-00000020.pt",
        "config.json",
        "lock",
        "log.jsonl",
    ]
    assert train(Line(), config(), tmp_path).resumed == 20
    assert (tmp_path / "final" / "model.pt").exists()


def test_a_full_disk_is_named_and_harms_no_checkpoint(tmp_path) -> None:
    train(Line(), config(steps=3), tmp_path / "small")
    size = (tmp_path / "small" / "checkpoint-00000003.pt").stat().st_size

    class Filled(Line):
        def loss(self, model, batch):
            if self.losses == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
            return super().loss(model, batch)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="checkpoint-00000008.pt") as caught:
            train(Filled(), config(), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in (tmp_path / "run").glob("*checkpoint*")] == ["checkpoint-00000004.pt"]
    assert train(Line(), config(), tmp_path / "run").resumed == 4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(steps=0), "steps is 0; expected 1 or more"),
        (dict(amp="fp8"), "amp is 'fp8'; expected one of no, bf16, fp16"),
        (dict(optimizer="sgd"), "optimizer is 'sgd'"),
        (dict(schedule="step"), "schedule is 'step'"),
        (dict(warmup_steps=30), "warmup_steps is 30; expected 0 to steps = 20"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; expected a number above 0"),
        (dict(max_grad_norm=-1.0), "max_grad_norm is -1.0"),
        (dict(weight_decay=-0.1), "weight_decay is -0.1; expected 0 or more"),
        (dict(weight_decay=float("nan")), "weight_decay is nan"),
        (dict(betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
        (dict(eps=0.0), "eps is 0.0; expected a number above 0"),
        (dict(initial_accumulator=-1.0), "initial_accumulator is -1.0"),
        (dict(optimizer="lamb", weight_decay=0.0), "weight_decay is 0 with optimizer 'lamb'"),
        (dict(seed=-1), r"seed is -1; expected 0 to 2\*\*63 - 1"),
        (dict(seed=2**63), "seed is 9223372036854775808"),
        (dict(parallel="tpu"), "parallel is 'tpu'"),
    ],
)
def test_values_out_of_range(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"ctxfast.training.LoopConfig: {message}"):
        config(**changed)


def test_more_of_bad_input(tmp_path) -> None:
    with pytest.raises(ValueError, match="best is 'f1'; expected one of the figures of evaluation, error"):
        train(Line(), config(best="f1"), tmp_path / "a")
    with pytest.raises(ValueError, match="device is 'tpu'; expected 'auto', 'cpu' or 'cuda'"):
        train(Line(), config(device="tpu"), tmp_path / "a")
    with pytest.raises(ValueError, match="'ddp' in a lone process; start it by torchrun"):
        train(Line(), config(parallel="ddp"), tmp_path / "b")
    frozen = Line()
    frozen.model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        train(frozen, config(), tmp_path / "c")


def test_tensorboard(tmp_path) -> None:
    train(Line(), config(tensorboard=True), tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20]
    assert len(events.Scalars("eval/error")) == 1


def test_batches() -> None:
    batches = Batches(10, 4, seed=3)
    assert batches.per_epoch == 3 and batches.steps(2) == 6 and batches.steps(2, accumulate=4) == 2
    for epoch in range(3):
        rows = [batches(3 * epoch + place) for place in range(3)]
        assert sorted(sum(rows, [])) == list(range(10)) and [len(part) for part in rows] == [4, 4, 2]
    assert batches(0) != batches(3) and batches(4) == Batches(10, 4, seed=3)(4)
    # Processes share an epoch: together they see what one sees.
    assert [batches(step, rank, 2) for step in range(3) for rank in range(2)] == [batches(step) for step in range(6)]
    lengths = [(7 * index) % 101 for index in range(1000)]
    grouped = Batches(1000, 10, lengths=lengths)
    rows = [grouped(step) for step in range(100)]
    assert sorted(sum(rows, [])) == list(range(1000))
    spread = [max(lengths[row] for row in part) - min(lengths[row] for row in part) for part in rows]
    assert sum(spread) / 100 < 5
    with pytest.raises(ValueError, match="lengths has 2 values; expected count = 3"):
        Batches(3, 1, lengths=[1, 2])
    with pytest.raises(ValueError, match="count is 0"):
        Batches(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(tmp_path, kind: str) -> None:
    """Two processes with half the batch each, killed and resumed, against one with all."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(HERE / "two_processes.py"), kind, str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=600,
        # Not the installed package, which may be another checkout.
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sys.path.insert(0, str(HERE))
    from two_processes import Halves, loop

    one = Halves(batch_size=8)
    train(one, loop("no"), tmp_path / "one")
    for name, value in final(tmp_path / "one").items():
        torch.testing.assert_close(final(tmp_path / "two")[name], value, rtol=1e-5, atol=1e-6)
    for part in ("best", "final"):
        assert (tmp_path / "two" / part / "model.pt").exists()
