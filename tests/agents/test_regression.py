from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import recycle
from agents import regression
from agents.regression import Args, Stream

SMALL = {"seeds": 3, "examples": 400, "flip": 10, "workers": 1}


def test_one_slow_bit_flips_from_block_to_block_and_the_fast_ones_are_drawn_anew():
    stream = Stream(seeds=4, flip=50)
    blocks = [stream.take()[0] for _ in range(3)]
    for block in blocks:
        assert block.shape == (50, 4, 20)
        assert (block[:, :, :15] == block[:1, :, :15]).all()
        assert 0.3 < block[:, :, 15:].mean() < 0.7
    for earlier, later in pairwise(blocks):
        assert ((earlier[0, :, :15] != later[0, :, :15]).sum(1) == 1).all()


def test_targets_are_sums_of_the_threshold_units_that_fire():
    stream = Stream(seeds=2, flip=5)
    bits, targets = stream.take()
    for example in range(5):
        for seed in range(2):
            inputs = [*bits[example, seed].tolist(), 1.0]
            wanted = 0.0
            for unit in range(100):
                signs = stream.weights[seed, :, unit].tolist()
                threshold = 21 * 0.7 - sum(sign < 0 for sign in signs)
                if sum(w * x for w, x in zip(signs, inputs, strict=True)) > threshold:
                    wanted += float(stream.outgoing[seed, unit])
            assert targets[example, seed] == wanted


def test_a_seed_has_its_own_stream_whatever_the_number_of_seeds():
    few, many = Stream(2, 10), Stream(5, 10)
    for _ in range(2):
        assert torch.equal(few.take()[0], many.take()[0][:, :2])


def test_side_by_side_is_what_each_would_learn_alone():
    net = regression.learners(3)
    bits, targets = Stream(3, 40).take()
    alone = nn.Sequential(nn.Linear(20, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        alone[0].weight.copy_(net[0].weight[5:10, :, 0])
        alone[0].bias.copy_(net[0].bias[5:10])
        alone[2].weight.copy_(net[2].weight[1:2, :, 0])
        alone[2].bias.copy_(net[2].bias[1:2])
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (net, alone)]
    for x, y in zip(bits, targets, strict=True):
        losses = (net(x.reshape(1, -1, 1)).flatten() - y).square(), (alone(x[1]) - y[1]).square()
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    assert torch.allclose(net[0].weight[5:10, :, 0], alone[0].weight, atol=1e-5)
    assert not torch.allclose(net[0].weight[:5, :, 0], alone[0].weight, atol=1e-2)


def test_one_product_for_all_learners_is_the_convolution_in_groups():
    net, bits = regression.learners(3), torch.rand(4, 60, 1)
    plain = nn.Sequential(nn.Conv1d(60, 15, 1, groups=3), nn.ReLU(), nn.Conv1d(15, 3, 1, groups=3))
    plain.load_state_dict(net.state_dict())
    outputs = [each(bits) for each in (net, plain)]
    assert torch.allclose(*outputs, atol=1e-6)
    for output in outputs:
        output.square().sum().backward()
    for mine, its in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, its.grad, atol=1e-5)
    graphs = [recycle.trace(each, lambda each=each: each(bits)) for each in (net, plain)]
    assert [str(graph) for graph in graphs] == [str(graphs[0])] * 2 and len(graphs[0]) == 3
    assert not any(group.why_not_foldable for group in graphs[0])
    assert not recycle.Recycler(graphs[0], recycle.find("monitor")()).tracker.unobserved


@pytest.mark.parametrize("arm", regression.ARMS)
def test_every_arm_gives_errors_dead_units_and_counts(arm, monkeypatch):
    every, options = regression.ARMS[arm]
    monkeypatch.setitem(regression.ARMS, arm, (every and 40, options))
    result = regression.run(arm, Args(**SMALL))
    assert result["error"].shape == result["dead"].shape == (3, 20)
    assert np.isfinite(result["error"]).all() and (result["dead"] >= 0).all() and (result["dead"] <= 5).all()
    assert result["recycled"].shape == (3,) and (result["recycled"] >= 0).all()
    assert arm != "none" or not result["recycled"].any()


def test_units_that_die_are_counted_and_recycled(monkeypatch):
    def dying(seeds):
        net = made(seeds)
        with torch.no_grad():
            net[0].bias[5:7] = -100.0  # two units of the second learner
        return net

    made = regression.learners
    monkeypatch.setattr(regression, "learners", dying)
    monkeypatch.setitem(regression.ARMS, "redo", (400, {}))
    assert (regression.run("none", Args(**SMALL))["dead"][1] >= 2).all()
    redo = regression.run("redo", Args(**SMALL))
    assert redo["recycled"][1] >= 2
    assert (redo["dead"][1, :-1] >= 2).all() and redo["dead"][1, -1] < redo["dead"][1, -2]


def test_the_command_keeps_what_is_there_and_draws(tmp_path, capsys):
    argv = ["--arms", "none", "--seeds", "3", "--examples", "400", "--flip", "10", "--log-folder", str(tmp_path)]
    assert regression.main(argv) == 0
    assert "3 learners of 5 units, 400 examples" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"none.npz", "regression.png"}
    kept = (tmp_path / "none.npz").stat().st_mtime_ns
    assert regression.main(argv) == 0
    assert (tmp_path / "none.npz").stat().st_mtime_ns == kept
    assert regression.main([*argv, "--learning-rate", "0.02"]) == 0
    assert (tmp_path / "none.npz").stat().st_mtime_ns != kept


@pytest.mark.parametrize(
    "argv", [["--arms", "reddo"], ["--seeds", "0"], ["--examples", "410"], ["--examples", "0"], ["--flip", "0"]]
)
def test_bad_options_are_one_line(tmp_path, capsys, argv):
    assert regression.main(["--examples", "400", "--flip", "10", "--log-folder", str(tmp_path / "new"), *argv]) != 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error:")
    assert not (tmp_path / "new").exists()
