"""``deltapatch anatomy``: where a base can be patched, and what that costs."""

import re
from pathlib import Path
from typing import Any

from deltapatch.loading import load_base
from deltapatch.methods.delta import Delta


def test_the_stages_of_the_demos_base_are_listed_with_their_joins_and_skips(run: Any) -> None:
    ran = run("anatomy", "demo")
    assert ran.code == 0
    rows = [re.findall(r"[^│\s]+(?: [^│\s]+)*", line) for line in ran.out.splitlines() if "layer" in line]
    assert rows == [
        ["layer1", "2", "addition 1", "32 -> 16", "NCHW", "3"],
        ["layer2", "2", "addition 1", "16 -> 32", "NCHW", "3"],
        ["layer3", "2", "addition 1", "32 -> 64", "NCHW", "3"],
        ["layer4", "2", "addition 1", "64 -> 128", "NCHW", "3"],
    ]
    assert "classifier: fc (128 features)" in ran.out


def test_the_costs_are_the_parameters_of_the_patches(run: Any) -> None:
    base = load_base("demo")
    ran = run("anatomy", "demo")
    costs = re.findall(r"│ (\d)(?: \(all\))? +│ (light|published) +│ ([\d,]+) ", ran.out)

    def parameters(modules: int, kind: Any) -> str:
        patch = Delta(modules=modules, norm="module", start="plain", module=kind).build(base)
        return f"{patch.num_parameters():,}"

    assert costs == [
        (str(modules), kind, parameters(modules, kind))
        for modules in (1, 2, 3, 4)
        for kind in ("light", "published")
    ]
    # 3x3 convolutions 64 -> width -> width, two norms and a linear layer to 3 skips.
    for (_, _, counted), width in zip(costs[:2], (16, 32), strict=True):
        assert counted == f"{9 * 64 * width + 9 * width * width + 2 * 2 * width + width * 3 + 3:,}"


def test_the_multiply_adds_are_those_of_the_convolutions(run: Any) -> None:
    ran = run("anatomy", "torchvision/resnet18", "--weights", "random", "--size", 64)
    assert ran.code == 0
    # The last stage of a ResNet-18 on 64 x 64 pixels is given 256 maps of 4 x 4.
    light = 4 * (9 * 256 * 32 + 9 * 32 * 32) + 32 * 3
    published = 16 * (9 * 256 * 128 + 9 * 128 * 128) + 128 * 3
    rows = [line for line in ran.out.splitlines() if line.startswith("│ 1 ")]
    for row, expected in zip(rows, (light, published), strict=True):
        assert f"{expected / 1e6:.1f} M" in row


def test_a_base_without_stages_is_told_plainly(run: Any, base_file: Path) -> None:
    ran = run("anatomy", f"{base_file}:flat", "--size", 8)
    assert ran.code == 0
    assert "no stage was found; only methods that need none, such as head, can patch it" in ran.words()


def test_a_base_that_is_not_there_is_one_line(run: Any) -> None:
    assert "'resnet50' is not a base" in run("anatomy", "resnet50").error
