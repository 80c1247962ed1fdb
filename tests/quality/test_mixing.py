from __future__ import annotations

import re

from stepquant.quality.mixing import inside, overrides_of, parts_of


def test_parts_are_divided_at_the_first_difference():
    names = ["conv_in", "down_blocks.0.a.0.x", "down_blocks.0.b", "down_blocks.1.a.0.x", "mid.x", "mid.y"]
    parts = parts_of(names)
    assert parts == {
        "conv_in": ["conv_in"],
        "down_blocks.0": names[1:3],
        "down_blocks.1.a.0.x": [names[3]],
        "mid": names[4:],
    }
    assert list(parts_of(parts["down_blocks.0"])) == names[1:3]
    assert list(parts_of(["net.blocks.0.x", "net.blocks.0.y", "net.blocks.10.x"])) == [
        "net.blocks.0",
        "net.blocks.10.x",
    ]
    assert parts_of(["only.one"]) == {"only.one": ["only.one"]}


def test_an_override_matches_a_part_and_what_is_inside():
    names = ["blocks.1", "blocks.1.x", "blocks.11.x", "a.blocks.1", "out", "out2"]
    (module,), (layer,) = overrides_of(["blocks.1"], ["out"], "w8a8"), overrides_of(["out"], ["out"], "w8a8")
    assert [name for name in names if re.search(module, name)] == ["blocks.1", "blocks.1.x"]
    assert [name for name in names if re.search(layer, name)] == ["out"]
    assert [name for name in names if inside(["blocks.1"])(name)] == ["blocks.1", "blocks.1.x"]
