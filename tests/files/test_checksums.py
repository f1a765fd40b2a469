"""Files that are damaged are removed, so that they are made again."""

import random

from jaxlm.files.checksums import NAME, Checksums


def test_every_flip_and_cut_is_found_and_sound_files_stay(tmp_path):
    rng = random.Random(0)
    contents = {f"{number}-cache": rng.randbytes(300) for number in range(60)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other").write_bytes(b"not ours")
    Checksums(tmp_path, "-cache").record_new()
    assert Checksums(tmp_path, "-cache").remove_damaged() == 0
    damaged = set(list(contents)[::2])
    for name in damaged:
        content = bytearray(contents[name])
        content[rng.randrange(300)] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(content if rng.random() < 0.7 else content[:200])
    (tmp_path / "new-cache").write_bytes(b"of a process that was killed")
    checksums = Checksums(tmp_path, "-cache")
    assert checksums.remove_damaged() == 30
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.pop("other") == b"not ours" and left.pop(NAME)
    assert left == {n: c for n, c in contents.items() if n not in damaged}
    # Made again, perhaps otherwise: the last line of a name counts.
    for name in damaged:
        (tmp_path / name).write_bytes(b"another")
    checksums.record_new()
    checksums.record_new()
    assert Checksums(tmp_path, "-cache").remove_damaged() == 0
    assert len((tmp_path / NAME).read_bytes().splitlines()) == 90
    (tmp_path / NAME).write_bytes(b"\xff garbage \n\n7-cache\n")
    assert Checksums(tmp_path, "-cache").remove_damaged() == 0
    assert not list(tmp_path.glob("*-cache"))
