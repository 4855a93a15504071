"""A fit on cached activations is the fit that runs the trunk in every epoch."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from digits import write_digits
from torch import nn
from toys import copied_state, same_state

from deltapatch.data import TaskData
from deltapatch.fitting.surveying import Trunk
from deltapatch.methods.delta import Delta
from deltapatch.methods.head import Head
from deltapatch.patch import Patch


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELTAPATCH_CACHE", str(tmp_path / "caches"))
    return tmp_path / "caches"


def _same(first: nn.Module, second: nn.Module) -> bool:
    return same_state(first, copied_state(second))


@pytest.mark.parametrize("method", [Delta(modules=1), Delta()], ids=["last stage", "all stages"])
@pytest.mark.parametrize(
    "options",
    [{}, {"augment": "flip"}, {"augment": "standard", "views": 3}, {"feature_noise": 0.1}],
    ids=["plain", "flip", "standard", "noise"],
)
def test_an_fp32_cache_gives_bit_for_bit_the_patch_of_running_the_trunk_anew(
    task: TaskData, fit: Any, method: Delta, options: dict[str, Any]
) -> None:
    kept = fit(task, method, cache="on", cache_dtype="fp32", **options)
    anew = fit(task, method, cache="off", **options)
    assert (kept.trunk_kept, anew.trunk_kept) == (True, False)
    assert _same(kept.patch, anew.patch)
    assert _same(kept.head_only, anew.head_only)


@pytest.mark.parametrize(("cache_dtype", "tolerance"), [("bf16", 0.02), ("int8", 0.06)])
def test_a_smaller_cache_gives_nearly_the_same_losses(
    task: TaskData, fit: Any, cache_dtype: str, tolerance: float
) -> None:
    kept = fit(task, cache="on", cache_dtype=cache_dtype, epochs=4)
    anew = fit(task, cache="off", epochs=4)
    assert not _same(kept.patch, anew.patch)
    for here, there in zip(kept.history, anew.history, strict=True):
        assert here.training_loss == pytest.approx(there.training_loss, abs=tolerance)
        assert here.validation_loss == pytest.approx(there.validation_loss, abs=tolerance)


def test_the_trunk_runs_once_an_image_for_all_fits(
    task: TaskData, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    features = Trunk.features

    def noted(self: Trunk, images: torch.Tensor) -> Any:
        ran.append(len(images))
        return features(self, images)

    monkeypatch.setattr(Trunk, "features", noted)
    first = fit(task, cache="on")
    filled = sum(ran)
    ran.clear()
    again = fit(task, Delta(modules=1, start="plain"), cache="on", seed=1, epochs=3)
    assert first.trunk_kept
    assert again.trunk_kept
    assert filled >= 64
    # The layout of rows is read off a few images; nothing else is computed again.
    assert sum(ran) <= 8


def test_the_patch_file_says_what_was_decided_and_why(task: TaskData, fit: Any, tmp_path: Path) -> None:
    for cache in ("on", "off"):
        path = fit(task, cache=cache).patch.save(tmp_path / f"{cache}.safetensors")
        fitted = Patch.load(path).info.fitted_on
        assert fitted.cache.startswith(f"trunk cache {cache}: ")
        assert fitted.precision == "precision fp32: asked for"


def test_a_head_keeps_its_features_for_later_fits(task: TaskData, fit: Any) -> None:
    first = fit(task, Head())
    assert "features alone" in first.notes[0]
    assert _same(first.patch, fit(task, Head()).patch)
    assert _same(first.patch, fit(task, Head(), cache="off").patch)


def test_noise_on_the_activations_changes_training_and_nothing_else(task: TaskData, fit: Any) -> None:
    plain, noisy = fit(task, epochs=1), fit(task, epochs=1, feature_noise=0.5)
    assert _same(plain.head_only, noisy.head_only)
    assert plain.history[0].training_loss != noisy.history[0].training_loss
    assert _same(noisy.patch, fit(task, epochs=1, feature_noise=0.5).patch)


def test_a_resumed_fit_does_not_decide_anew(
    task: TaskData, fit: Any, at_step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured again, the times could turn it into another fit."""

    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    whole = fit(task, epochs=3, cache="on")
    at_step(3, 1, press_ctrl_c)
    path = tmp_path / "fit.checkpoint"
    first = fit(task, epochs=3, cache="auto", checkpoint=path)
    assert first.interrupted
    at_step(99, 1, press_ctrl_c)
    monkeypatch.setattr("deltapatch.fitting.surveying.decide", None)
    resumed = fit(task, epochs=3, cache="auto", checkpoint=path, resume=True)
    assert resumed.notes[0] == first.notes[0]
    assert resumed.trunk_kept == first.trunk_kept
    assert len(resumed.history) == len(whole.history)


def test_a_fit_that_is_killed_while_it_fills_goes_on_where_it_was(
    tmp_path: Path, root: Path, fit: Any, task: TaskData
) -> None:
    """Killed at the third batch, then fitted whole: as if nothing had been."""
    data = write_digits(tmp_path / "digits.npz")
    script = f"""
import os, signal
import deltapatch as dp
from deltapatch.fitting.cache import TrunkCache
write, written = TrunkCache.write, []
def killing(self, *given):
    if len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(1)
    write(self, *given)
TrunkCache.write = killing
config = dp.FitConfig(epochs=2, batch_size=16, precision="fp32", cache="on", cache_dtype="fp32")
dp.fit(dp.load_base("demo"), {str(data)!r}, dp.methods.Delta(modules=1), config, progress=False)
"""
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    from deltapatch.data import open_data
    from deltapatch.fitting.cache import list_caches

    (entry,) = list_caches(root)
    assert entry.filled == 32
    options = {"batch_size": 16, "cache_dtype": "fp32"}
    resumed = fit(open_data(data), cache="on", **options)
    assert _same(resumed.patch, fit(open_data(data), cache="off", **options).patch)


def test_a_compiled_tail_gives_the_same_fit(
    task: TaskData, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend that runs what was traced as it is: inductor would call a compiler of C++."""
    compiled: list[nn.Module] = []

    def traced(self: nn.Module) -> None:
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    plain = fit(task)
    monkeypatch.setattr(nn.Module, "compile", traced)
    found = fit(task, compile=True)
    assert len(compiled) == 1
    for name, tensor in found.patch.state_dict().items():
        torch.testing.assert_close(tensor, plain.patch.state_dict()[name], rtol=1e-3, atol=1e-4)
