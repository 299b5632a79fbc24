"""Promises of the whole data factory: passages become what a fine-tuning learns from, each step as a user runs it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from llm_server import Reply, ScriptedServer
from test_llm_local import write_llm
from test_train import ROOT, run

from datamodules.curation.candidates import candidates_of
from datamodules.sample import Example, text_item
from datamodules.shards import Split, write_split
from lightning_modules.encoder.checkpoint import read_provenance, save_encoder

ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "koi", "lynx", "mole", "newt", "owl", "pig"]


def write_passages(folder: Path) -> str:
    write_split(folder, [Example(f"p{n}", target=text_item(f"the {name} sat on mat {n}")) for n, name in enumerate(ANIMALS)])
    return str(folder)


def text_of(example: Example) -> str:
    assert example.target is not None
    return str(example.target.parts[0].data)


def answers(body: dict, number: int) -> Reply | str:
    """Asks after the animal; finds what is asked about an owl too bad."""
    text = body["messages"][-1]["content"]
    if "Passage: the" in text and "Query:" not in text:
        return json.dumps(
            {"task": "Given a question, find it.", "query": f"where did the {text.split('Passage: the ')[1].split()[0]} go"}
        )
    return json.dumps({"reason": "because", "score": 1 if "owl" in text else 4})


def test_passages_become_training_data_that_is_learnt_from(tiny_encoder, processor, tmp_path):
    passages, llm = write_passages(tmp_path / "passages"), write_llm(tmp_path / "llm", max_position_embeddings=4096)
    save_encoder(tmp_path / "encoder", tiny_encoder, processor, provenance={})
    at = {name: tmp_path / name for name in ("generated", "rated", "mined", "judged")}
    with ScriptedServer(answers) as server:
        who = ["llm.init_args.model=a-model", f"llm.init_args.base_url={server.base_url}"]
        run("conf=generate", f"source={passages}", f"out={at['generated']}", *who)
        said = run("conf=rate", f"source={at['generated']}", f"out={at['rated']}", *who)
    assert "1 set aside: 1 x quality below 3" in said
    encoder = [f"checkpoint={tmp_path / 'encoder'}", "k=5", "num_workers=0", "device=cpu"]
    run("conf=mine", f"queries={at['rated']}", f"corpus={passages}", f"out={at['mined']}", *encoder)
    local = f"llm={{class_path: lightning_modules.llm.local.Local, init_args: {{model: {llm}, device: cpu}}}}"
    run("conf=rate_candidates", f"source={at['mined']}", f"corpus={passages}", f"out={at['judged']}", local)
    chosen = "selection={rankings: [relevance, likelihood], positive: best, max_share: null}"
    where = [f"source={at['judged']}", f"corpus={passages}", f"out={tmp_path / 'train' / 'made'}"]
    run("conf=assemble", *where, chosen)

    made, judged = Split(tmp_path / "train" / "made"), Split(at["judged"])
    assert len(made) == len(judged) == 15
    corpus = {text_of(Split(passages).read(n)) for n in range(16)}
    for n in range(15):
        example, candidates = made.read(n), candidates_of(judged.read(n))
        assert len(candidates) in (5, 6)
        mined = (made.read(n).meta or {})["provenance"].get("negatives", [])
        assert all(one["rated"].keys() == {"relevance", "likelihood"} and one["checkpoint"] for one in mined)
        assert all(0 <= one["relevance"] <= 3 and one["likelihood"] < 0 for one in candidates)
        provenance = (example.meta or {})["provenance"]
        assert provenance["query"]["prompt"].startswith("fret@")
        assert text_of(example) in corpus
        if example.negatives:
            assert str(example.negatives[0].parts[0].data) in corpus - {text_of(example)}
            assert provenance["negatives"][0]["by"] == "mine"
    assert sum(len(made.read(n).negatives) for n in range(15)) > 5
    card = json.loads((tmp_path / "train" / "made" / "card.json").read_text())
    assert [step["stage"] for step in card["made_by"]] == ["assemble", "rate", "mine", "rate", "generate", "source"]

    tasks = "data.tasks={made: {shards: made, batch_size: 4, negatives: 1}}"
    fit = [f"data.root={tmp_path / 'train'}", f"model.init_from={tmp_path / 'encoder'}", tasks, "data.num_workers=0"]
    out = tmp_path / "finetune"
    run("conf=finetune", *fit, "trainer.max_steps=3", f"trainer.default_root_dir={out}", "trainer.accelerator=cpu")
    assert read_provenance(out / "encoder")["sha256"] != read_provenance(tmp_path / "encoder")["sha256"]


def test_killed_at_any_moment_and_run_again_the_answers_are_the_same_set_and_none_twice(tmp_path):
    passages, out = write_passages(tmp_path / "passages"), tmp_path / "out"

    def slowly(body: dict, number: int) -> Reply:
        time.sleep(0.05)
        return Reply(str(answers(body, number)))

    with ScriptedServer(slowly) as server:
        who = ["llm.init_args.model=a-model", f"llm.init_args.base_url={server.base_url}", "llm.init_args.concurrency=2"]
        command = ["conf=generate", f"source={passages}", f"out={out}", "block_size=6", *who]
        for kill_at in (3, 9):
            process = subprocess.Popen([sys.executable, "train.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL)
            while len(server.requests) < kill_at:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
        run(*command)
        num_asked = len(server.requests)
        run("conf=generate", f"source={passages}", f"out={tmp_path / 'whole'}", "block_size=6", *who)
    lines = [json.loads(line) for file in sorted(out.glob("answers/*.jsonl")) for line in file.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines) == 16
    assert num_asked <= 16 + 2 * 2  # no more than what was under way when it was killed
    assert Split(out).digest == Split(tmp_path / "whole").digest
