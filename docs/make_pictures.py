"""Draws the pictures of the README and the docs: python docs/make_pictures.py"""

from pathlib import Path
from tempfile import TemporaryDirectory

import deltapatch as dp
from deltapatch.data import open_data
from deltapatch.demo.base import write_digits_npz
from deltapatch.evaluation.answers import answer, skip_weights
from deltapatch.evaluation.drawings import draw_arcs

SVG = "http://www.w3.org/2000/svg"
PICTURES = Path(__file__).parent / "pictures"


def main() -> None:
    """The skips that the demo's patch has learned in the last stage, mean and spread over the test images."""
    base = dp.load_base("demo")
    with TemporaryDirectory() as directory:
        digits = Path(directory) / "digits.npz"
        write_digits_npz(digits)
        task = open_data(digits)
        patch = dp.fit(base, task, progress=False)
        assert task.test is not None
        weights = skip_weights(patch, answer(base, task.test, patch))[-1]
    PICTURES.mkdir(exist_ok=True)
    svg = draw_arcs(weights.mean, weights.spread, weights.existing)
    # A file of its own names its language; inside a page that is not needed.
    svg = svg.replace("<svg ", f'<svg xmlns="{SVG}" ', 1)
    (PICTURES / "skips.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
