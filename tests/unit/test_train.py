"""The command line, in this process; `test_launch.py` has real ones."""

import time

import tomli

from let_plugin import train


def main(capfd, *args):
    """(exit code, standard output, standard error) of the command line in this process."""
    try:
        train.main(list(map(str, args)))
        code = 0
    except SystemExit as error:
        code = error.code
    return code, *capfd.readouterr()


def check_refused(result, tmp_path, *expected):
    code, out, err = result
    assert code == 2
    assert out == "" and "Traceback" not in err
    for text in expected:
        assert text in err
    assert not (tmp_path / "out").exists()


def test_usage(capfd):
    for args in (["-h"], ["--help"], []):
        code, *texts = main(capfd, *args)
        usage = texts.pop(0 if args else 1)
        assert (code, texts) == (0 if args else 2, [""]) and usage.startswith("usage: let-train CONFIG.toml")
        assert all(option in usage for option in ("--check", "--print-config", "--section.key"))


def test_all_kinds_of_mistakes_at_once_each_with_its_source(tmp_path, capfd):
    path = tmp_path / "run.toml"
    path.write_text(f'''
    base = "tests.support.tiny"
    dump_folder = "{tmp_path / "out"}"
    let = {{ teacher.spec = "tiny_teacher", teacher.path = "no/such/teacher", wieght = 0.5 }}
    training = {{ stepz = 3, gc_freq = 0 }}
    metrics.rank_0_only = true
    checkpoint.interval = 0
    runtime.device = "gpu"
    ''')
    cli = ["--training.steps=-1", "--metrics.log-freq", "often", "--let.no-enabel", "--hf-assets-path", "no/tokenizer"]
    result = main(capfd, path, *cli, "--parallelism.tensor_parallel_degree", "2", "--check")
    expected = [
        (path, "let.wieght = 0.5: unknown; did you mean 'weight'?"),
        (path, "training.stepz = 3: unknown; did you mean 'steps'?"),
        (path, "metrics.rank_0_only = True: a key of an older version; now: "),
        (path, "checkpoint.interval = 0: Checkpoint interval needs to be at least 1 step"),
        (path, "runtime.device = 'gpu': not a valid choice; did you mean 'cpu'? valid names: auto, cpu"),
        ("command line", "metrics.log_freq = 'often': expected an integer"),
        ("command line", "let.enabel = False: unknown; did you mean 'enable'?"),
        ("command line", "training.steps = -1: must be at least 1"),
        (path, "training.gc_freq = 0: must be at least 1"),
        ("command line", "parallelism: tensor_parallel_degree = 2: degrees must be at least 1"),
        ("command line", "hf_assets_path = 'no/tokenizer': "),
        (path, "let.teacher.path = 'no/such/teacher': no such folder"),
    ]
    check_refused(result, tmp_path, *(f"\n  {source}: {text}" for source, text in expected))
    assert f"let-train: {len(expected)} problems in the configuration\n" in result[2]
    assert [file.name for file in tmp_path.iterdir()] == ["run.toml"]


def test_rank_0_reports_before_the_others(tmp_path, tiny_config, capfd, monkeypatch):
    """torchrun ends every rank when one has failed: another rank that failed first would take the message along."""
    tiny_config.write_text(tiny_config.read_text() + "[training]\nstepz = 3\n")
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    check_refused(main(capfd, tiny_config, "--print-config"), tmp_path, f"{tiny_config}: training.stepz = 3: unknown")
    assert not slept
    monkeypatch.setenv("RANK", "1")
    check_refused(main(capfd, tiny_config), tmp_path, "let-train: 1 problem")
    assert slept and slept[0] >= 5


def test_check_prints_the_report_and_trains_nothing(tmp_path, tiny_config, capfd):
    code, out, _ = main(capfd, tiny_config, "--check", "--training.seq_len", "32")
    assert code == 0
    assert out.startswith("LET preflight\n  student    llama3 tiny: ")
    assert "N_T / (3 N_S)" in out
    assert not (tmp_path / "out").exists()


def test_print_config_is_toml_with_the_overrides(tmp_path, tiny_config, capfd):
    own = ["--training.steps", "3", "--let.weight", "0.25", "--log", "titan"]
    code, out, _ = main(capfd, tiny_config, "--print-config", *own)
    assert code == 0
    tables = tomli.loads(out)
    assert tables["base"] == "tests.support.tiny"
    assert (tables["training"]["steps"], tables["training"]["seq_len"], tables["runtime"]["log"]) == (3, 64, "titan")
    assert (tables["let"]["enable"], tables["let"]["weight"], tables["let"]["stop_step"]) == (True, 0.25, 4)
    assert not (tmp_path / "out").exists()
    (tmp_path / "again.toml").write_text(out)
    assert main(capfd, tmp_path / "again.toml", "--print-config")[1] == out
