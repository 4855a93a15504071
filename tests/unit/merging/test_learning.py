"""Learning coefficients: closed forms, gradients, which epoch is kept, and what is left alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from deltapatch import merging
from deltapatch.merging import MergeError, RunOptions
from deltapatch.merging.learning import LearningConfig, learn_coefficients

EXACT = LearningConfig(learning_rate=0.05, epochs=300, weight_decay=0, clip=1e9)


def mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean()


def moved(module: nn.Module, seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """The module's state with every floating tensor moved at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and "running" not in name
        else tensor.clone()
        for name, tensor in module.state_dict().items()
    }


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    ).eval()


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(5, (count,), generator=generator)


def test_one_block_has_the_closed_form() -> None:
    """λ = <Xτ, y - Xθ₀> / ‖Xτ‖², here 0.37."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    base = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    tau = torch.randn(1, 6, generator=generator, dtype=torch.float64)
    y = x @ (base + 0.37 * tau).T
    module = nn.Linear(6, 1, bias=False).double()
    learned = learn_coefficients(
        module, [{"weight": base + tau}], {"weight": base}, [(x, y)], objective=mean_square, config=EXACT
    )
    assert learned.how.coefficients["weight"][0] == pytest.approx(0.37, abs=1e-6)


def test_several_blocks_solve_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    module = nn.Linear(6, 3).double()
    base, *models = (moved(module, seed) for seed in range(3))
    learned = learn_coefficients(
        module,
        models,
        base,
        [(x, y)],
        objective=mean_square,
        config=LearningConfig(learning_rate=0.3, epochs=600, weight_decay=0, clip=1e9),
    )
    columns = [x @ (model["weight"] - base["weight"]).T for model in models]
    columns += [(model["bias"] - base["bias"]).expand(50, 3) for model in models]
    left = torch.stack(columns, dim=-1).reshape(150, 4)
    right = (y - x @ base["weight"].T - base["bias"]).reshape(150, 1)
    expected = torch.linalg.lstsq(left, right).solution.flatten().tolist()
    found = [*learned.how.coefficients["weight"], *learned.how.coefficients["bias"]]
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("partitions", [1, 3])
def test_the_first_step_goes_along_the_gradient_that_autograd_finds(partitions: int) -> None:
    """Every tensor kind: convolution, norm scale and shift, bias, matrix, in every group."""
    module, batch = convolutional(), images(7)
    base, models = module.state_dict(), [moved(module, 1, 0.3), moved(module, 2, 0.3)]
    config = LearningConfig(learning_rate=1e-4, epochs=1, partitions=partitions, schedule="constant")
    how = learn_coefficients(module, models, base, [batch], config=config).how
    step = 1e-3
    for name, _ in module.named_parameters():
        for model in range(2):
            for group in range(partitions):
                lost: list[float] = []
                for sign in (1, -1):
                    tried = {key: [[0.0] * partitions for _ in models] for key in how.coefficients}
                    tried[name][model][group] = sign * step
                    flat = tried if partitions > 1 else {k: [r[0] for r in v] for k, v in tried.items()}
                    state = merging.atlas(models, base, coefficients=flat, partitions=partitions)
                    copy = convolutional()
                    copy.load_state_dict(state)
                    with torch.no_grad():
                        outputs = copy.double()(batch[0].double())
                    lost.append(float(functional.cross_entropy(outputs, batch[1])))
                slope = (lost[0] - lost[1]) / (2 * step)
                row = how.coefficients[name][model]
                moved_by = row[group] if isinstance(row, tuple) else row
                if abs(slope) > 1e-3:  # AdamW's first step is the rate against the sign of the gradient
                    assert moved_by == pytest.approx(-1e-4 * (1 if slope > 0 else -1), rel=1e-2)
    assert how.coefficients["1.running_var"] == ((0.0,) * 2 if partitions == 1 else ((0.0,) * 3,) * 2)


def test_the_loss_falls_and_the_merge_gives_it() -> None:
    module, batches = convolutional(), [images(20, seed) for seed in range(2)]
    base, models = module.state_dict(), [moved(module, 1, 0.5), moved(module, 2, 0.5)]
    config = LearningConfig(learning_rate=0.05, epochs=8)
    learned = learn_coefficients(module, models, base, batches, validation=batches, config=config)
    assert learned.validation_losses[-1] < learned.validation_losses[0]
    copy = convolutional()
    copy.load_state_dict(merging.merge(learned.how, models, base))
    with torch.no_grad():
        losses = [float(functional.cross_entropy(copy(x), y)) for x, y in batches]
    assert sum(losses) / 2 == pytest.approx(min(learned.validation_losses), rel=1e-5)


def test_the_epoch_is_chosen_on_images_that_are_not_trained_on() -> None:
    """Held-out labels that contradict the training's: every epoch is worse than the start, which is kept."""
    module, (x, _) = convolutional(), images(20)
    with torch.no_grad():
        answers = module(x).argmax(1)
    wrong = (answers + 1) % 5
    batches, held_out = [(x, wrong)], [(x, answers)]
    config = LearningConfig(learning_rate=0.05, epochs=4)
    models = [moved(module, 1, 0.5)]
    learned = learn_coefficients(
        module, models, module.state_dict(), batches, validation=held_out, config=config
    )
    assert min(learned.losses) < learned.losses[0]
    assert learned.best_epoch == 0
    assert all(value == 0 for row in learned.how.coefficients.values() for value in row)
    last = learn_coefficients(module, models, module.state_dict(), batches, config=config)
    assert last.best_epoch == 4
    assert last.validation_losses == ()


def test_entropy_needs_no_labels_and_falls() -> None:
    module, (x, _) = convolutional(), images(20)
    config = LearningConfig(learning_rate=0.05, epochs=10)
    models = [moved(module, 1, 0.5)]
    learned = learn_coefficients(
        module, models, module.state_dict(), [x], objective="entropy", validation=[x], config=config
    )
    with torch.no_grad():
        p = module(x).softmax(1)
    assert learned.validation_losses[0] == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert learned.validation_losses[-1] < learned.validation_losses[0]


def test_weight_decay_and_l1_pull_towards_the_base() -> None:
    module, batch = convolutional(), images(20)
    models = [moved(module, 1, 0.5)]

    def size(config: LearningConfig) -> float:
        how = learn_coefficients(module, models, module.state_dict(), [batch], config=config).how
        return sum(abs(value) for row in how.coefficients.values() for value in row)

    free = size(LearningConfig(learning_rate=0.05, epochs=20, weight_decay=0))
    assert size(LearningConfig(learning_rate=0.05, epochs=20, weight_decay=5)) < 0.9 * free
    assert size(LearningConfig(learning_rate=0.05, epochs=20, weight_decay=0, l1=0.1)) < 0.9 * free


def test_the_module_stays_as_it_is_also_when_learning_fails() -> None:
    module, batch = convolutional(), images(4)
    module.train()
    module[1].eval()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    models = [moved(module, 1)]

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum() * float("nan")

    for objective in ("supervised", fails):
        try:
            learn_coefficients(
                module, models, state, [batch], objective=objective, config=LearningConfig(epochs=1)
            )
        except MergeError as error:
            assert "nan" in str(error)  # noqa: PT017
        assert [one.training for one in module] == [True, False, True, True, True, True]
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


def test_tied_parameters_are_one_block() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5, bias=False)
            self.second = nn.Linear(5, 5, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    torch.manual_seed(0)
    module = Tied()
    model = torch.randn(5, 5)
    x, y = torch.randn(9, 5), torch.arange(9) % 5
    how = learn_coefficients(
        module,
        [{"first.weight": model, "second.weight": model}],
        module.state_dict(),
        [(x, y)],
        config=LearningConfig(learning_rate=0.1, epochs=3),
    ).how
    assert how.coefficients["first.weight"] == how.coefficients["second.weight"] != (0.0,)


def test_a_skipped_head_is_the_modules_own_and_threads_change_nothing() -> None:
    module, batch = convolutional(), images(8)
    models = [{**moved(module, 1, 0.5), "5.weight": torch.zeros(9, 4), "5.bias": torch.zeros(9)}]
    base = {name: tensor for name, tensor in module.state_dict().items() if not name.startswith("5.")}
    config = LearningConfig(learning_rate=0.05, epochs=2)
    found = [
        learn_coefficients(module, models, base, [batch], config=config, run=run)
        for run in (RunOptions(skip=("5.*",), threads=1), RunOptions(skip=("5.*",), threads=3))
    ]
    assert found[0] == found[1]
    assert "5.weight" not in found[0].how.coefficients


def _generator() -> object:
    return iter([images(2)])


@pytest.mark.parametrize(
    ("batches", "models", "objective", "message"),
    [
        (_generator, None, "supervised", "only once"),
        (list, None, "supervised", "no batches"),
        (lambda: [images(2)], None, "mystery", "no objective 'mystery'"),
        (lambda: [images(2)], [{"w": torch.zeros(2)}], "supervised", "the module has no tensor 'w'"),
        (lambda: [images(2)], [{"0.weight": torch.zeros(2)}], "supervised", r"\(4, 3, 3, 3\) in the module"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    batches: Callable[[], list[tuple[Tensor, Tensor]]],
    models: list[dict[str, Tensor]] | None,
    objective: str,
    message: str,
) -> None:
    module = convolutional()
    models = models or [moved(module, 1)]
    base = models[0] if len(models[0]) == 1 else module.state_dict()
    with pytest.raises(MergeError, match=message):
        learn_coefficients(module, models, base, batches(), objective=objective)  # pyright: ignore
