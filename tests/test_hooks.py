"""A person's code on several ranks: where hooks run, that none changes one rank unnoticed, that all have one source."""

import pytest

import cnnmpi
from cnnmpi.distributed import DisagreementError, UserError
from cnnmpi.train import Config, set_up
from cnnmpi.train.code import Code
from cnnmpi.train.hooks import Hooks
from tests.test_fit import QUICK, Small, images


@pytest.mark.mpi(min_size=2)
def test_a_hook_runs_on_rank_0_or_on_all_as_it_says(ranks, shared_tmp):
    called: list[str] = []

    @cnnmpi.on_all_ranks
    def everywhere(run, loss):
        called.append("all")

    cnnmpi.fit(
        Small, data=images(), out=shared_tmp / "run", on_step=[everywhere, lambda run, loss: called.append("one")],
        **{**QUICK, "shards": 8, "epochs": 1},
    )  # fmt: skip
    assert called.count("all") == 2 and called.count("one") == (2 if ranks.rank == 0 else 0)


def test_a_method_can_be_marked_too():
    class Watch:
        seen = 0

        def look(self, run, loss):
            self.seen += 1

    watch = Watch()
    marked = cnnmpi.on_all_ranks(watch.look)
    marked(None, 0.0)
    assert watch.seen == 1 and marked.on_all_ranks


@pytest.mark.mpi(min_size=2)
def test_a_hook_that_changes_the_weights_of_one_rank_is_noticed(ranks, shared_tmp):
    def spoil(run, loss):
        run.model.head.params["weight"][...] += 1

    config = Config(out=shared_tmp / "run", agree_every=1, **{**QUICK, "shards": 8})
    run = set_up(config, ranks, Code({"simplecnn": Small}), data=images(), hooks=Hooks(on_step=spoil))
    with pytest.raises(DisagreementError, match=r"head\.weight"):
        run.run()


@pytest.mark.mpi(min_size=2)
def test_ranks_whose_networks_have_other_sources_are_refused(ranks, tmp_path, shared_tmp, monkeypatch):
    (tmp_path / "net.py").write_text(
        f"from tests.test_fit import Small\n\n\nclass Net(Small):\n    'As rank {ranks.rank} has it.'\n"
    )
    monkeypatch.chdir(tmp_path)
    config = Config(model="net.py:Net", out=shared_tmp / "run", **{**QUICK, "shards": 8})
    with pytest.raises(UserError, match="ranks differ in the source of the code that they train with"):
        set_up(config, ranks, data=images())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("setting", ["lr", "shards", "metrics"])
def test_ranks_with_other_settings_or_metrics_are_refused(ranks, shared_tmp, setting):
    lr, shards = 0.1 + (setting == "lr") * ranks.rank, 8 + (setting == "shards") * ranks.rank
    metrics = {f"m{(setting == 'metrics') * ranks.rank}": lambda logits, targets: (0, 1)}
    config = Config(out=shared_tmp / "run", **{**QUICK, "lr": lr, "shards": shards})
    with pytest.raises(UserError, match=r"the ranks differ in their (settings|metrics): rank 1 "):
        set_up(config, ranks, Code({"simplecnn": Small}), data=images(), metrics=metrics)
