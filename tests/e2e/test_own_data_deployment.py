"""Two sites with images of their own; the server's process may not read them."""

import pytest

from flwr_colearn import History
from simulations.bench import sites
from simulations.launch.deployment import Deployment


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    for parent in folder.parents[:2]:
        parent.chmod(0o755)  # so that only the sites' own folders keep the server out
    sites.write_folders(folder, images=60)
    deployed = Deployment(folder / "deployment", prefix=sites.prefix())
    try:
        sites.start(deployed, folder)
        yield deployed
    finally:
        deployed.stop()


def test_the_sites_train_together_on_what_the_server_cannot_read(deployment):
    folder = deployment.folder.parent
    if deployment.prefix:
        assert sites.can_read(deployment, folder)
        assert not sites.can_read(deployment, folder / "delft")
    reached = sites.accuracy(deployment, folder, sites.SITES, seed=0, epochs=8)
    assert reached > 0.3  # on the third folder; chance is 0.1
    last = History.read(deployment.home / "colearn" / "delft-utrecht-0" / "history.jsonl").records[
        -1
    ]
    assert last.participants == ["delft", "utrecht"]
    assert last.server_metrics == {}
    assert last.site_metrics.keys() == {"delft", "utrecht"}
    assert all(site["num-examples"] == 6 for site in last.site_metrics.values())
    assert 0 <= last.site_means["accuracy"] <= 1
    for site in deployment.sites:
        assert "54 training examples in 10 classes" in site.log.read_text()


def test_only_the_named_participants_get_the_model(deployment):
    folder = deployment.folder.parent
    before = deployment.sites[0].log.stat().st_size
    sites.accuracy(deployment, folder, ("utrecht",), seed=0, epochs=2)
    record = History.read(deployment.home / "colearn" / "utrecht-0" / "history.jsonl").records[-1]
    assert record.participants == ["utrecht"]
    assert deployment.sites[0].log.read_text()[before:].count("training examples") == 0
