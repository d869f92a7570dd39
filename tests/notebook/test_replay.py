"""Replay, in both directions: what does not change the runs passes, what does is found. Each change is made on a copy of the definitions."""

import nbformat
import pytest
from lab import pool, replay, report

KINDS = {"learned": ("P1a", 0), "rope": ("P1b", 1), "mamba": ("P1a", 2), "hybrid": ("P2c", 0), "mixed": ("mixed", 1)}


@pytest.fixture(scope="module")
def source():
    return nbformat.read(report.ROOT / "recall.ipynb", as_version=4)


@pytest.fixture
def changed(source, tmp_path):
    """changed(old, new, ...): the definitions after replacements in the text of their cells."""
    def changed(*replacements):
        book = nbformat.from_dict(source)
        for old, new in replacements:
            cells = [c for c in book.cells if c.cell_type == "code" and old in c.source]
            assert cells, old
            for cell in cells:
                cell.source = cell.source.replace(old, new)
        nbformat.write(book, tmp_path / "recall.ipynb")
        return report.definitions(tmp_path / "recall.ipynb")
    return changed


def some_runs(names):
    """A few finished runs under the definitions' settings; raises Missing where there are none of these settings."""
    experiments = {group: names.EXPERIMENTS[group] for group, _ in KINDS.values()}
    runs = pool.finished(experiments, names.run, pool.Plan(), say=lambda text: None)
    return {name: [runs[group][place]] for name, (group, place) in KINDS.items()}


def test_the_present_code_makes_the_stored_runs(recall):
    table = replay.replay(some_runs(recall), recall.REPLAY)
    assert list(table["replay"]) == ["answers", "rule", "opening"]


HARMLESS = {
    "a renamed variable": [("optimizer", "adam")],
    "another docstring": [("Train one model by the rule", "Train a single model by the rule")],
    "a reformatted line": [("q, v, i = draw(M, n), draw(K, n), draw(length - tau - 1, n)", "q = draw(M, n)\n    v = draw(K, n)\n    i = draw(length - tau - 1, n)")],
}


@pytest.mark.parametrize("change", HARMLESS)
def test_a_refactoring_retrains_nothing(changed, change):
    names = changed(*HARMLESS[change])
    replay.replay(some_runs(names), names.REPLAY)


def test_a_moved_cell_retrains_nothing(source, tmp_path):
    book = nbformat.from_dict(source)
    place = next(i for i, c in enumerate(book.cells) if "def vocabulary" in c.source)
    book.cells.insert(place + 1, book.cells.pop(place))
    nbformat.write(book, tmp_path / "recall.ipynb")
    names = report.definitions(tmp_path / "recall.ipynb")
    replay.replay(some_runs(names), names.REPLAY)


NUMBERS = {  # they are part of the setting, so that its runs are not there
    "a rate": [('("rope", 8): 1e-2', '("rope", 8): 2e-2')],
    "the batch size": [("batch: int = 64", "batch: int = 32")],
    "a threshold of the rule": [("learned: float = 0.99 ", "learned: float = 0.98 ")],
    "the averaging": [("average: float = 0.99 ", "average: float = 0.9 ")],
    "the version of the rule": [("RULE = 1", "RULE = 2")],
}


@pytest.mark.parametrize("change", NUMBERS)
def test_a_changed_number_asks_for_its_runs(changed, change):
    """The error names the run, the number in which the nearest stored one differs, and what to do."""
    names = changed(*NUMBERS[change])
    with pytest.raises(pool.Missing, match="runs of the present settings are not among the finished ones.*the nearest stored run differs in .* there, .* here.*TRAIN=missing"):
        some_runs(names)


CODE = {  # they are in no setting: only behaviour tells
    "the sampler": ("opening", [("draw(length - tau - 1, n)", "draw(length - tau - 2, n)")]),
    "the order of draws": ("opening", [("q, v, i = draw(M, n), draw(K, n), draw(length - tau - 1, n)", "v, q, i = draw(K, n), draw(M, n), draw(length - tau - 1, n)")]),
    "an initialisation": ("opening", [("torch.randn(positions, d) / math.sqrt(d)", "torch.randn(positions, d) / d")]),
    "the loss": ("opening", [("values.to(self.device))", "values.to(self.device), label_smoothing=0.01)")]),
    "the clipping": ("opening", [("(s.clip / (flat.grad.norm() + 1e-6))", "(0.5 * s.clip / (flat.grad.norm() + 1e-6))")]),
    "the warm-up": ("opening", [("min(step / s.warmup, 1.0)", "min(step / s.warmup, 1.0) ** 2")]),
    "the optimiser": ("opening", [("torch.optim.Adam([flat]", "torch.optim.NAdam([flat]"), (", fused=True)", ")")]),
    "the vocabulary": ("answers", [("np.random.seed(0)", "np.random.seed(1)")]),
    "the model": ("answers", [("x = x + mixer(norm(x))", "x = x + mixer(x)"), ("return spec and cpu_mamba.fused_step(spec) or PlainStep(model)", "return PlainStep(model)")]),
    "the test set": ("answers", [('f"test {s.K}', 'f"tests {s.K}')]),
    "a number in the rule": ("rule", [("max(step // 10, min(1_000, s.budget))", "max(step // 10, min(900, s.budget))")]),
}


@pytest.mark.parametrize("change", CODE)
def test_changed_code_is_found(changed, change):
    """Replay fails, by the check that is meant for it, and names the run and what to do."""
    check, replacements = CODE[change]
    names = changed(*replacements)
    with pytest.raises(replay.Stale) as raised:
        replay.replay(some_runs(names), names.REPLAY)
    assert replay.ADVICE[check] in str(raised.value) and "seed" in str(raised.value)


def test_all_runs_replay(recall):
    """Every eighth finished run answers as it did and ends where it ended."""
    runs = pool.finished(recall.EXPERIMENTS, recall.run, pool.Plan(), say=lambda text: None)
    checks = recall.REPLAY | {"opening": lambda run: run["opening"]}
    replay.replay(runs, checks, sample=8)
