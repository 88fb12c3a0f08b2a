"""Reading, tabulating and plotting runs, on run folders made by hand."""

import json
from functools import reduce

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import drawing
from rezero_jax.analysis import __main__ as diagnosis
from rezero_jax.analysis import figures, plots, table, theme
from rezero_jax.analysis.ablation import Ablation, plot_ablation
from rezero_jax.analysis.gates import Gates
from rezero_jax.analysis.statistics import Estimate
from rezero_jax.analysis.table import by_label
from rezero_jax.analysis.theme import plain_ticks, save
from rezero_jax.errors import UserError
from rezero_jax.runs.reader import Run, epochs_to

RESIDUAL = "model.residual"


def make_run(folder, losses, depth=2, **config):
    """A run with one line an epoch, whose gates after epoch e are e, 2 e, ..."""
    fields = {"seed": 0, "data.name": "digits", RESIDUAL: "rezero", "model.width": 8}
    nested = {}
    for key, value in (fields | {"model.depth": depth} | config).items():
        *parents, last = key.split(".")
        reduce(lambda section, name: section.setdefault(name, {}), parents, nested)[last] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(nested))
    return write(
        folder,
        [
            {"step": 10 * epoch, "epoch": float(epoch), "train/epoch_loss": loss}
            | {"train/loss": loss, "train/accuracy": 0.5, "eval/loss": loss, "eval/accuracy": 0.5}
            | {f"alpha/{layer}": epoch * (layer + 1.0) for layer in range(depth)}
            for epoch, loss in enumerate(losses, 1)
        ],
    )


def make_text_run(folder, bits, **config):
    """A run of a language model: a line every 10 steps, an evaluation after each."""
    make_run(folder, [], **config)
    keys = ("train/loss", "train/bits_per_byte", "eval/loss", "eval/bits_per_byte")
    return write(
        folder,
        [
            {"step": 10 * i, "epoch": i / 9, "alpha/0": 0.0} | dict.fromkeys(keys, b)
            for i, b in enumerate(bits, 1)
        ],
    )


def write(folder, lines):
    """The run of a folder with these lines."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run.read(folder)


def two_settings(folder):
    """Two seeds of rezero, and a run of norm that is shorter and worse."""
    return [
        make_run(folder / "a", [4.0, 1.0]),
        make_run(folder / "b", [2.0, 0.5], seed=1),
        make_run(folder / "c", [9.0], **{RESIDUAL: "norm"}),
    ]


def test_the_time_to_a_target_is_log_linear_between_epochs():
    losses = 3.0 * np.exp(-0.7 * np.arange(1, 9))  # exactly log-linear: the answer is closed form
    for target in (1.0, 0.4, 0.05):
        np.testing.assert_allclose(epochs_to(losses, target), np.log(3.0 / target) / 0.7)
    assert epochs_to([0.9, 0.5], 1.0) == 1.0
    assert epochs_to([2.0, 1.0], 1.0) == 2.0
    assert epochs_to([2.0, 1.5], 1.0) is None
    assert epochs_to([2.0, 0.5, 3.0, 0.4], 0.5) == 2.0  # the first time counts
    with pytest.raises(UserError, match="not positive"):
        epochs_to([1.0], 0.0)


def test_labels_name_the_fields_that_differ(tmp_path):
    fields = [
        {RESIDUAL: "fixup", "optim.rate": 2},
        {"optim.rate": 1, "seed": 3, "mesh.cpu_devices": 2},
        {"optim.rate": 1},
        {"optim.rate": 3},
    ]
    runs = [make_run(tmp_path / str(i), [1.0], **f) for i, f in enumerate(fields)]
    assert list(by_label(runs[1:3])) == ["rezero"]  # neither seed nor hardware is a setting
    # The optimizer's settings for a rule are left out unless they separate runs of the rule.
    assert by_label(runs[:3]) == {"residual=fixup": runs[:1], "residual=rezero": runs[1:3]}
    assert list(by_label(runs))[1:] == ["residual=rezero, rate=1", "residual=rezero, rate=3"]
    key = "optim.alpha.learning_rate"  # not that of the other parameters
    frozen, free = (make_run(tmp_path / str(v), [1.0], **{key: v}) for v in (0.0, None))
    assert list(by_label([frozen, free])) == ["alpha.learning_rate=0.0", "alpha.learning_rate=None"]
    # Fields that follow from the rule are left out.
    norm = make_run(tmp_path / "n", [1.0], **{RESIDUAL: "pre_norm", "model.final_norm": True})
    gated = make_run(tmp_path / "g", [1.0], **{"model.final_norm": False, "model.scan": True})
    assert list(by_label([norm, gated])) == ["residual=pre_norm", "residual=rezero"]


def test_of_several_folders_those_without_a_run_are_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "a", [1.0])
    (tmp_path / "notes.txt").write_text("x")
    assert [r.folder for r in Run.read_all(sorted(tmp_path.iterdir()))] == [run.folder]
    assert capsys.readouterr().err == ""  # beside the runs of a glob, a file is expected
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
    assert [r.folder for r in Run.read_all(sorted(tmp_path.iterdir()))] == [run.folder]
    names = f"{tmp_path / 'b'}, {tmp_path / 'c'}"
    assert capsys.readouterr().err == f"folders without a run are left out: {names}\n"
    with pytest.raises(UserError, match="none of the 2"):
        Run.read_all([tmp_path / "notes.txt", tmp_path])


@pytest.mark.parametrize("ends", [(0.2, 0.9), (0.3, 3.3), (0.02, 9.0), (1e-9, 2.0)])
def test_a_log_axis_has_several_labels_in_its_range(ends):
    axis = Figure().subplots()
    axis.set(yscale="log", ylim=ends)
    theme.plain_ticks(axis)
    axis.figure.canvas.draw()
    labels = [(text.get_text(), text.get_position()[1]) for text in axis.get_yticklabels()]
    labels += [
        (text.get_text(), text.get_position()[1]) for text in axis.get_yticklabels(minor=True)
    ]
    assert sum(bool(text) and ends[0] <= y <= ends[1] for text, y in labels) > 1


def test_table_has_mean_and_range_or_interval_over_seeds(tmp_path):
    runs = two_settings(tmp_path)
    assert table.table(runs, after=[1, 2], targets=[2.0]).splitlines()[2:] == [
        "| residual=rezero | 2 | 3.00 (2.00-4.00) | 0.75 (0.50-1.00) | 1.25 (1.00-1.50) |",
        "| residual=norm | 1 | 9.00 | not reached | not reached |",
    ]
    losses = [make_run(tmp_path / "up", [3.0, 1.0, 2.0])]
    assert table.table(losses, [], []).splitlines()[::2] == [
        "| run | seeds | last | best |",
        "| rezero | 1 | 2.00 | 1.00 |",
    ]
    # Student's interval of two values, 3 +- 1 tan(0.475 pi).
    (row,) = table.table(runs[:2], [1], [], confidence=0.95).splitlines()[2:]
    assert row == "| rezero | 2 | 3.00 [-9.71, 15.71] |"
    more = [make_run(tmp_path / str(i), [1.0, loss]) for i, loss in enumerate((0.0021, 5e-4))]
    (row,) = table.table([*more, runs[1]], [2], [0.0025]).splitlines()[2:]
    assert row == "| rezero | 3 | 0.17 (5.0e-4-0.50) | 2 of 3 reached |"


def test_times_to_a_target_and_their_estimate(tmp_path):
    runs = two_settings(tmp_path)
    with pytest.raises(UserError, match='did you mean "accuracy"'):
        runs[0].time_to("acuracy", 0.5)
    times = [run.time_to("loss", 2.0) for run in runs]
    assert times == [1.5, 1.0, None]  # log-linear from 4 to 1: halfway at 2
    figure = figures.plot_times({"two": times[:2], "none": [None], "one": [None, 2.0]}, "epochs")
    assert list(figure.axes[0].lines[1].get_xdata()) == [1.25]
    ends = figure.axes[0].collections[0].get_segments()[0][:, 0]
    np.testing.assert_allclose(ends, Estimate.of([1.5, 1.0]).interval())
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["two", "none\n0 of 1 reached it", "one\n1 of 2 reached it"]


def test_bits_per_byte_by_steps_and_the_speed_up_over_the_first_run(tmp_path):
    runs = [
        make_text_run(tmp_path / "a", [4.0, 3.0, 2.5, 2.0], **{RESIDUAL: "pre_norm"}),
        make_text_run(tmp_path / "b", [3.0, 2.0]),
        make_text_run(tmp_path / "c", [2.0, 2.2], seed=1),
        make_text_run(tmp_path / "d", [1.5], **{RESIDUAL: "post_norm"}),
    ]
    # pre_norm takes 40 steps to 2.0; rezero's seeds 20 and 10.
    assert table.table(runs, [10, 20], [2.5, 2.0], metric="bits_per_byte").splitlines() == [
        "| run | seeds | step 10 | step 20 | steps to 2.5 | steps to 2.0 | speed-up |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| residual=pre_norm | 1 | 4.00 | 3.00 | 30 | 40 | 1.00 |",
        "| residual=rezero | 2 | 2.50 (2.00-3.00) | 2.10 (2.00-2.20) | 15 (10-20) | 15 (10-20) "
        "| 2.67 |",
        "| residual=post_norm | 1 | 1.50 | not reached | 10 | 10 |  |",  # a single evaluation
    ]


def curves_of(axis):
    return [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in axis.lines]


def test_plot_of_one_run_shows_its_numbers_and_the_legend_covers_no_panel(tmp_path):
    figure = plots.plot_run(make_run(tmp_path / "a", [3.0, 2.0, 1.0]))
    *panels, _ = figure.axes
    assert [axis.get_xlabel() for axis in panels] == ["epoch"] * 3
    drawn = {line.get_label(): line.get_ydata().tolist() for line in panels[0].lines}
    assert drawn["training, epoch mean"] == [3.0, 2.0, 1.0]
    (mesh,) = panels[2].collections
    np.testing.assert_array_equal(mesh.get_array(), [[1, 2, 3], [2, 4, 6]])
    np.testing.assert_array_equal(mesh.get_coordinates()[0, :, 0].mean(), 2)
    save(figure, tmp_path / "a.png")  # lays it out
    (box,) = (legend.get_window_extent() for legend in figure.legends)
    assert all(axis.get_window_extent().y0 > box.y1 for axis in panels)


def test_a_single_point_is_visible_and_ticks_are_whole_layers(tmp_path):
    loss, _, alpha = plots.plot_run(make_run(tmp_path / "a", [2.0])).axes
    assert [line.get_marker() for line in loss.lines] == ["o", "o", "s"]
    assert curves_of(alpha) == [([0, 1], [1, 2])]  # by layer, since there is one step
    assert figures.plot_times({"none": [None]}, "epochs").axes[0].get_xticks().size == 0
    one = Ablation(("trunk.0",), 2.0, np.array([2.5]), np.array([0]), np.array([2.5]))
    ticks = plot_ablation(one).axes[0].get_xticks()
    assert (ticks == ticks.round()).all()
    axis = Figure().subplots()
    axis.plot([2, 64], [0.2, 0.7])
    axis.set_yscale("log")
    drawing.size_axis(axis, [2, 64], "depth")
    plain_ticks(axis)
    axis.figure.canvas.draw()
    assert sum(bool(text.get_text()) for text in axis.get_yticklabels(which="both")) > 1


def test_plots_of_language_models_show_bits_per_byte(tmp_path):
    runs = [make_text_run(tmp_path / str(b), [4.0, b], seed=i) for i, b in enumerate((2.0, 3.0))]
    bits, gates, _ = plots.plot_run(runs[0]).axes  # the loss would be the same curve again
    assert (bits.get_title(), gates.get_title()) == ("bits per byte", "alpha")
    assert (bits.get_xlabel(), gates.get_xlabel()) == ("step", "step")
    assert [y for _, y in curves_of(bits)] == [[4.0, 2.0]] * 2
    assert curves_of(plots.plot_comparison(runs).axes[0]) == [([10, 20], [4.0, 2.5])]
    diverged = make_text_run(tmp_path / "9", [9e9, 2.0], residual="other")
    figure = plots.plot_comparison([runs[0], diverged])
    assert figure.axes[0].get_ylim() == (1.9, 8)  # leaves room for the other curve


def test_comparisons_of_seeds_and_of_unlike_runs(tmp_path, capsys):
    mlp = make_run(tmp_path / "mlp", [3.0, 2.0, 1.0])
    seed = make_run(tmp_path / "seed", [1.0, 1.0], seed=1)
    axis = plots.plot_comparison([mlp, seed]).axes[0]
    assert curves_of(axis) == [([1, 2], [2.0, 1.5])]  # over the epochs that all seeds have
    assert axis.lines[0].get_label() == "rezero (2 seeds)"

    fields = {"data.name": "stdlib", "model.heads": 4, RESIDUAL: "pre_norm"}
    text = make_text_run(tmp_path / "text", [4.0, 2.0], **fields)
    axis = plots.plot_comparison([mlp, text]).axes[0]
    assert axis.get_xlabel() == "step"
    assert curves_of(axis) == [([10, 20, 30], [3.0, 2.0, 1.0]), ([10, 20], [4.0, 2.0])]
    names = [line.get_label() for line in axis.lines]
    assert names == ["residual=rezero", "residual=pre_norm"]  # no heads=None of the MLP
    assert axis.get_title() == "depth 2, width 8"  # and not the data of the first alone
    write(text.folder, [])
    assert plots.main([str(mlp.folder), str(text.folder)]) == 2
    assert "text has logged nothing yet" in capsys.readouterr().err


def test_what_gates_did(tmp_path):
    run = make_run(tmp_path / "a", [1.0] * 3, depth=3)
    np.testing.assert_array_equal(run.alphas()[0], [10, 20, 30])
    np.testing.assert_array_equal(run.alphas()[1], np.outer([1, 2, 3], [1, 2, 3]))
    alphas = [[0.0, -0.1, 0.02], [0.05, 0.4, 0.01], [0.05, -0.3, 0.03]]
    for line, values in zip(run.lines, alphas, strict=True):
        line |= {f"alpha/{layer}": value for layer, value in enumerate(values)}
    gates = Gates.of_run(run)
    np.testing.assert_allclose(gates.mean_abs, [0.04, 0.46 / 3, 0.38 / 3])
    np.testing.assert_array_equal(gates.opening_steps, [20, 10, np.nan])
    assert gates.opening.startswith("2 of 3 gates opened")
    assert gates.opening.endswith("the earliest is layer 1 and the latest layer 0")
    assert Gates(gates.steps[:1], np.ones((1, 2))).opening.endswith("all by step 10")
    np.testing.assert_array_equal(gates.peak_steps, [20, 20, 30])
    every, mean, peaks = figures.plot_gates(gates).axes[:3]
    np.testing.assert_array_equal(every.collections[0].get_array(), gates.alphas.T)
    np.testing.assert_array_equal(mean.lines[0].get_ydata(), gates.mean_abs)
    np.testing.assert_array_equal(peaks.lines[0].get_xdata(), gates.peak_steps)

    ungated = make_run(tmp_path / "ungated", [1.0], depth=0)
    for run, why in ((ungated, "has no gates"), (write(ungated.folder, []), "has logged nothing")):
        with pytest.raises(UserError, match=why):
            Gates.of_run(run)


def test_spectra_are_histograms_of_logarithms_and_saved_in_the_format_of_their_ending(tmp_path):
    values = np.logspace(-3, 3, 7)
    names = [f"a label of very many words that has the number {i}" for i in range(7)]
    figure = figures.plot_spectra({name: values for name in names})
    patch = figure.axes[0].patches[0]
    expected = np.histogram(range(-3, 4), patch.get_data().edges)[0] / 7
    np.testing.assert_array_equal(patch.get_data().values, expected)
    assert patch.get_label() == f"{names[0]}, mean square {(values**2).mean():.3g}"
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert save(figure, tmp_path / f"a.{ending}").read_bytes().startswith(start)
    box = figure.axes[0].get_window_extent()  # long labels leave the curves their room
    assert box.width > 0.8 * figure.bbox.width
    assert box.height > 200
    assert matplotlib.rcParams["font.size"] == 10  # the theme does not change matplotlib's own
    with pytest.raises(UserError, match=r'"\.pnj"; did you mean "\.png"'):
        save(figure, tmp_path / "a.pnj")
    with pytest.raises(UserError, match=r"No such file or directory.*; name another file"):
        save(figure, tmp_path / "nowhere" / "a.png")


def test_command_lines(tmp_path, capsys):
    a, b = (make_run(tmp_path / name, [2.0, 1.0], seed=i).folder for i, name in enumerate("ab"))
    assert plots.main([str(a)]) == 0
    assert (a / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plots.main([str(a), str(b), f"--out={tmp_path / 'both.png'}"]) == 0
    assert (tmp_path / "both.png").exists()
    assert plots.main([str(a), str(b), "--target=1.5", f"--out={tmp_path / 'times.svg'}"]) == 0
    assert "epochs to a loss of 1.5" in (tmp_path / "times.svg").read_text()
    assert table.main([str(a), "--epochs", "1"]) == 0
    assert "| rezero | 1 | 2.00 |" in capsys.readouterr().out
    for main in (plots.main, table.main, diagnosis.main):
        assert main([str(tmp_path / "nothing")]) == 2
        assert "no run" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):  # as with an unset variable of the shell
            main([""])
        assert "is empty (an unset variable?)" in capsys.readouterr().err
