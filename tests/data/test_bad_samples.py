"""The ledger over ranks and lives of a run: nothing is counted twice, nothing is lost."""

import json

import pytest

from ldm.data.bad_samples import Bad, BadSamples, in_words
from ldm.errors import LdmError


def report(slot, kind="decode"):
    return Bad(slot, kind, "shard-0007.tar", f"k{slot}", "because")


def live(ledger, slots, bad):
    """Take in `slots` of this rank; those in `bad` fail once."""
    for slot in slots:
        if slot % ledger.world_size == ledger.rank:
            ledger.update([slot], [report(slot, kind) for s, kind in bad if s == slot])


BAD = [(3, "decode"), (4, "caption_encoding"), (17, "decode"), (18, "decode"), (31, "decode"), (33, "size_policy")]


@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("first", [1, 2, 3])
def test_counts_over_ranks_and_lives(first, then):
    """A life on `first` ranks whose loaders ran ahead of the save at slot 20, then one on `then` ranks."""
    ranks = [BadSamples(max_fraction=1.0, rank=r, world_size=first) for r in range(first)]
    for ledger in ranks:
        live(ledger, range(32), BAD)
    states = [ledger.state_dict(next_slot=20) for ledger in ranks]
    saved = json.loads(json.dumps(ranks[0].merged(states)))
    assert saved["counts"] == {"decode": 3, "caption_encoding": 1} and len(saved["recent"]) == 4
    ranks = [BadSamples(max_fraction=1.0, rank=r, world_size=then) for r in range(then)]
    for ledger in ranks:
        ledger.load_state_dict(saved)
        live(ledger, range(20, 40), BAD)
    end = ranks[-1].merged([ledger.state_dict() for ledger in ranks])
    assert end["counts"] == {"decode": 4, "caption_encoding": 1, "size_policy": 1}
    assert [row[0] for row in end["recent"]] == [slot for slot, _ in BAD]
    whole = BadSamples(max_fraction=1.0)
    live(whole, range(40), BAD)
    assert whole.merged([whole.state_dict()]) == end  # whatever the ranks, lives, and what was read ahead


def test_the_window_is_in_samples_of_all_ranks():
    ranks = [BadSamples(max_fraction=0.1, rank=r, world_size=4) for r in range(4)]
    for ledger in ranks:
        live(ledger, range(10_300), [(slot, "decode") for slot in (2, 90, 290, 310, 10_250)])
    recent = ranks[0].merged([ledger.state_dict() for ledger in ranks])["recent"]
    assert [row[0] for row in recent] == [290, 310, 10_250]  # 10 000 back from the last one


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("then", [1, 2])
def test_the_share_that_is_said_counts_what_earlier_lives_saw(first, then):
    ranks = [BadSamples(rank=r, world_size=first) for r in range(first)]
    for ledger in ranks:
        live(ledger, range(5000), [(slot, "decode") for slot in range(90)])
    saved = json.loads(json.dumps(ranks[0].merged([ledger.state_dict() for ledger in ranks])))
    ranks = [BadSamples(rank=r, world_size=then) for r in range(then)]
    with pytest.raises(LdmError) as stopped:
        for ledger in ranks:
            ledger.load_state_dict(saved)
            live(ledger, range(5000, 6000), [(slot, "decode") for slot in range(5900, 6000)])
    # of the 5000 and 900 that were seen the limit of 100 in 10 000 is reached in the eleventh (of two: in both halves)
    assert stopped.value.what == "1.7 % bad samples"


def test_what_training_took_is_told_once_and_not_ahead():
    ledger = BadSamples(max_fraction=1.0)
    live(ledger, range(16), BAD)
    ledger.update([16], [report(16)] * 3)
    assert [ledger.taken(range(4)), ledger.taken(range(4, 8)), ledger.taken(range(8, 17))] == [1, 1, 3]
    assert ledger.taken(range(17)) == 0
    assert sum(ledger.counts.values()) == 5  # `counts` is of all that was loaded


def test_the_file_holds_the_first_ten_of_each_kind(tmp_path):
    file = tmp_path / "run" / "bad_samples.jsonl"
    ledger = BadSamples(max_fraction=1.0, file=file)
    live(ledger, range(300), [(slot, "decode" if slot % 3 else "caption_encoding") for slot in range(300)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    by_kind = {kind: [row["key"] for row in rows if row["kind"] == kind] for kind in ("decode", "caption_encoding")}
    assert by_kind == {
        "decode": [f"k{slot}" for slot in range(300) if slot % 3][:10],
        "caption_encoding": [f"k{3 * n}" for n in range(10)],
    }
    assert all(row.keys() == {"kind", "shard", "key", "reason"} for row in rows)
    assert ledger.counts == {"decode": 200, "caption_encoding": 100}


def test_a_hostile_key_cannot_fake_a_line(tmp_path):
    file = tmp_path / "bad_samples.jsonl"
    with pytest.raises(LdmError) as stopped:
        BadSamples(strict=True, file=file).update([0], [Bad(0, "decode", "a\nerror[X]: b.tar", "k\n{}\x1b[31m", "r")])
    assert len(file.read_text().splitlines()) == 1 and json.loads(file.read_text())["key"] == "k\n{}\x1b[31m"
    assert "\n" not in stopped.value.line() and "\x1b" not in file.read_text()


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "in the way").write_text("")
    ledger = BadSamples(max_fraction=1.0, file=tmp_path / "in the way" / "bad_samples.jsonl")
    live(ledger, range(8), BAD)
    assert sum(ledger.counts.values()) == 2


def test_words():
    assert in_words({"caption_encoding": 2, "decode": 10}) == "10 decode, 2 caption_encoding"
