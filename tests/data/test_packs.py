"""The data sets that come with the repository are whole and open as what their READMEs say; others are found by PAPERWORKS_PACKS."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from paperworks.data import available_packs, open_folder, verify_pack
from paperworks.data.packs import pack_path
from paperworks.errors import InputError


def test_packs_are_whole():
    assert {"cardiac_mr", "nuclei", "blood_cells", "hippocampus_mr"} <= set(available_packs())
    for name in ("cardiac_mr", "nuclei", "blood_cells", "hippocampus_mr"):
        assert verify_pack(name) > 100


def test_cardiac_mr():
    folder = open_folder("pack:cardiac_mr")
    assert (len(folder.items), len(folder.train), len(folder.val)) == (526, 414, 112) and not folder.problems
    assert folder.class_names == ("background", "left ventricle") and not folder.instances
    assert not {i.group for i in folder.train} & {i.group for i in folder.val}
    assert len({i.group for i in folder.items}) == 30 and folder.fingerprint.channels == 1


def test_hippocampus_mr():
    folder = open_folder("pack:hippocampus_mr")
    assert folder.class_names == ("background", "anterior", "posterior") and not folder.problems
    assert (len(folder.train), len(folder.val)) == (60, 20) and folder.fingerprint.spacing == (1.0, 1.0, 1.0)


def test_nuclei():
    folder = open_folder("pack:nuclei")
    assert (len(folder.train), len(folder.val)) == (120, 40) and folder.instances and not folder.problems
    assert folder.class_names == ("background", "nucleus")
    total = sum(len(np.unique(folder.instance_map(i))) - 1 for i in folder.items)
    assert total == 4251


def test_blood_cells_are_boxes():
    folder = open_folder("pack:blood_cells")
    assert folder.task == "detection" and (len(folder.train), len(folder.val)) == (200, 64) and not folder.problems
    assert folder.class_names == ("background", "RBC", "WBC", "Platelets")


def test_unknown_pack():
    with pytest.raises(InputError, match="no pack is called 'nucleii'; did you mean pack:nuclei"):
        open_folder("pack:nucleii")


def test_packs_of_the_environment(pairs, monkeypatch):
    place = pairs / "more"
    place.mkdir()
    for role in ("images", "masks"):
        shutil.move(pairs / role, place / "mine" / role)
    (place / "mine" / "README.md").write_text("# mine")
    monkeypatch.setenv("PAPERWORKS_PACKS", str(place))
    assert pack_path("pack:mine") == place / "mine" and "nuclei" in available_packs()
    assert len(open_folder("pack:mine").items) == 6
    monkeypatch.setenv("PAPERWORKS_PACKS", str(pairs / "nowhere"))
    assert "nuclei" in available_packs()


@pytest.mark.parametrize("harm", ["changed", "missing", "added", "unlisted"])
def test_a_pack_that_is_not_whole(tmp_path, monkeypatch, harm):
    pack = tmp_path / "p"
    shutil.copytree(pack_path("nuclei"), pack)
    monkeypatch.setenv("PAPERWORKS_PACKS", str(tmp_path))
    assert verify_pack("p") == verify_pack("nuclei")
    victim = pack / ("SHA256SUMS" if harm == "unlisted" else "new.png" if harm == "added" else "images/000.png")
    if harm in ("missing", "unlisted"):
        victim.unlink()
    else:
        victim.write_bytes(b"other")
    with pytest.raises(InputError, match=victim.name):
        verify_pack("p")
