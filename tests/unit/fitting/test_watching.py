"""The progress bar: what a person sees of a fit."""

import pytest

from deltapatch.fitting.history import Epoch
from deltapatch.fitting.watching import FitWatch


def _watch(enabled: bool) -> None:
    with FitWatch(enabled, epochs=2) as watch:
        with watch.surveying("base on train images", 8) as advance:
            advance(8)
        watch.step(1, 1, 4, 0.5, 0.75)
        watch.epoch(Epoch(1, 0.5, 0.75, 0.25, 0.875, 1e-3, 0.1))
        watch.step(2, 1, 4, 0.25, 1.0)


def test_the_bar_stands_on_standard_error_and_says_loss_accuracy_and_validation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    _watch(enabled=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "base on train images" in err
    assert "8/8" in err
    assert "loss 0.250  accuracy 100.0%  validation 87.5%" in err


def test_a_bar_that_is_switched_off_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _watch(enabled=False)
    assert capsys.readouterr() == ("", "")
