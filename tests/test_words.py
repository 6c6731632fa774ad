"""Words for a person."""

from cp_convert.words import near


def test_near_names_what_is_like_it_or_what_there_is() -> None:
    assert near("ringg", ["ring", "usp"]) == "did you mean ring?"
    assert near("x", ["ring"]) == "there is ring."
    assert near("x", []) == "there are none."
    told = near("x", [f"block.{number}" for number in range(1000)])
    assert told.endswith("block.29 and 970 more.")
