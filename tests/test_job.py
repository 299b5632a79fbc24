"""Promises of long jobs: blocks are whole or absent, any array makes the same, and nothing is mixed."""

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from datamodules.job import Aside, Job, array_task
from datamodules.sample import Example, text_item
from datamodules.shards import Split

QUIET = Console(quiet=True)
NUM, SIZE = 25, 4  # seven blocks, the last of one record


def job_of(out: Path, index: int = 0, size: int = 1, **made_by: object) -> Job:
    return Job(out, {"stage": "test", **made_by}, NUM, SIZE, array_task(index, size))


def do(job: Job, *, most: int = NUM) -> None:
    """Every third record makes nothing; block 2 makes nothing at all."""
    for _, block in zip(range(most), job.blocks(QUIET), strict=False):
        kept = [n for n in job.positions(block) if n % 3 and block != 2]
        aside = [Aside(f"{n}", "third", "x") for n in job.positions(block) if n not in kept]
        job.write(block, (Example(f"{n}", text_item(f"text {n}")) for n in kept), {"records": len(kept) + len(aside)}, aside)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}


def test_a_job_becomes_a_split_that_says_what_became_of_every_record(tmp_path):
    job = job_of(tmp_path / "out")
    do(job)
    manifest = job.finish(QUIET)
    assert manifest is not None
    assert Split(tmp_path / "out").keys == [str(n) for n in range(NUM) if n % 3 and n // SIZE != 2]
    assert manifest["about"]["counts"] == {"records": NUM}
    assert manifest["about"]["aside"] == {"third": 12}
    assert [record.key for record in job.aside()] == [str(n) for n in range(NUM) if n % 3 == 0 or n // SIZE == 2]
    assert not (tmp_path / "out" / "000002.tar").exists()


@pytest.mark.parametrize("size", [2, 3, 9])
def test_any_number_of_tasks_in_any_order_makes_the_same(tmp_path, size):
    do(job_of(tmp_path / "one"))
    job_of(tmp_path / "one").finish(QUIET)
    jobs = [job_of(tmp_path / "many", index, size) for index in range(size)]
    for job in reversed(jobs):
        assert job.finish(QUIET) is None
        do(job)
    assert jobs[0].finish(QUIET) is not None
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


def test_a_job_goes_on_where_it_stopped(tmp_path):
    do(job_of(tmp_path / "whole"))
    do(job_of(tmp_path / "cut"), most=3)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/*.tar")}
    (tmp_path / "cut" / ".000003.tar.1.partial").write_bytes(b"half")
    (tmp_path / "cut" / "000004.tar").write_bytes(b"renamed, but not said to be done")
    do(job_of(tmp_path / "cut"))
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert job_of(tmp_path / "cut").finish(QUIET)
    job_of(tmp_path / "whole").finish(QUIET)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_a_block_whose_shard_was_lost_is_made_again(tmp_path):
    do(job_of(tmp_path))
    (tmp_path / "000001.tar").write_bytes(b"cut off")
    (tmp_path / "000003.tar").unlink()
    job = job_of(tmp_path)
    assert [block for block in range(7) if not job.is_done(block)] == [1, 3]
    do(job)
    assert job.finish(QUIET)


def test_a_shard_that_was_changed_is_not_indexed(tmp_path):
    do(job_of(tmp_path))
    first, last = (tmp_path / "000000.tar").read_bytes(), (tmp_path / "000001.tar").read_bytes()
    assert len(first) == len(last)
    (tmp_path / "000000.tar").write_bytes(last)
    with pytest.raises(ValueError, match=r"000000.tar is no longer as it was written; delete it"):
        job_of(tmp_path).finish(QUIET)
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        Split(tmp_path)


def test_a_shard_made_anew_with_other_bytes_is_indexed_anew(tmp_path):
    do(job_of(tmp_path))
    job_of(tmp_path).finish(QUIET)
    (tmp_path / "000001.tar").unlink()
    job = job_of(tmp_path)
    job.write(1, [Example(f"{n}", text_item(f"other {n}")) for n in (4, 5, 7)], {"records": 4}, [Aside("6", "third", "x")])
    assert job.finish(QUIET)
    assert Split(tmp_path).read(2).query == text_item("other 4")


def test_another_making_is_refused_with_what_differs(tmp_path):
    do(job_of(tmp_path, prompt="a"), most=1)
    with pytest.raises(ValueError, match=r"was begun otherwise: prompt was 'a', now 'b'. Give another folder"):
        job_of(tmp_path, prompt="b")
    with pytest.raises(ValueError, match="block_size was 4, now 5"):
        Job(tmp_path, {"stage": "test", "prompt": "a"}, NUM, 5, array_task(0, 1))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "000.tar").touch()
    with pytest.raises(ValueError, match=r"holds 000.tar of another making"):
        job_of(tmp_path / "foreign")


def test_a_job_that_kept_nothing_says_why(tmp_path):
    job = Job(tmp_path, {}, 2, 1, array_task(0, 1))
    for block in job.blocks(QUIET):
        job.write(block, [], {}, [Aside(f"{block}", "too short")])
    with pytest.raises(ValueError, match="nothing was kept of 2 records: 2 x too short"):
        job.finish(QUIET)


def test_a_damaged_description_is_named(tmp_path):
    do(job_of(tmp_path))
    file = tmp_path / "blocks" / "000001.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"000001.json is damaged .* delete it, and the block is made again"):
        job_of(tmp_path).finish(QUIET)
    file.unlink()
    do(job_of(tmp_path))
    assert json.loads(file.read_text())["num_examples"] == 3
    shutil.rmtree(tmp_path / "blocks")
    assert job_of(tmp_path).finish(QUIET) is None


def test_the_array_is_slurms_unless_it_is_given(monkeypatch):
    assert (array_task(None, None).index, array_task(None, None).size) == (0, 1)
    for name, value in {"ID": "12", "COUNT": "5", "MIN": "10"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert (array_task(None, None).index, array_task(None, None).size) == (2, 5)
    assert array_task(0, 1).size == 1
    for wrong in ((3, None), (None, 3), (3, 3), (-1, 3)):
        with pytest.raises(ValueError, match="give both, the index from 0 to size - 1"):
            array_task(*wrong)
