"""Settings from config.ini and flags.

If these fail, a user's typing error or a forgotten default silently changes what is computed,
or ends in a traceback.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.catalog import RELEASED
from lib.console.arguments import arguments, overrides, settings_arguments
from lib.errors import SettingsError
from lib.ledger.sqlite_file import database_path
from lib.settings import (
    DEFAULT_CONFIG,
    Overrides,
    Settings,
    from_snapshot,
    load_settings,
    override,
    snapshot,
)
from schema.settings import SECTIONS
from tests.conftest import SOME_PROTEINS, Place, Script

OPTIONS = [
    (section, option) for section, (schema, _) in SECTIONS.items() for option in schema().fields
]
PATHS = [
    ("model", "esm_model"),
    ("model", "base_model"),
    ("model", "weights_directory"),
    ("input", "fasta"),
    ("output", "folder"),
    ("database", "url"),
]
WHOLE = ["nonsense", "1.5", "-1", "0", "1 2", "nan", "1e3", "99999999999999999999", "9" * 5000]
NONSENSE = {
    ("model", "esm_model"): ["~nosuchuser/model.pt"],
    ("model", "base_model"): ["~nosuchuser/base.pt"],
    ("model", "source"): ["nonsense", "Hugging Face", "fair_esm", "fair-esm huggingface"],
    ("model", "weights_directory"): ["~nosuchuser/weights"],
    ("model", "download_url"): ["nonsense", "file:///etc/passwd", "ftp://a/b", "http:// a", "//a"],
    ("model", "repr_layers"): ["nonsense", "1.5", "1 last", "1;2", ",", "[1]"],
    ("model", "num_layers"): WHOLE,
    ("model", "hidden_dim"): WHOLE,
    ("model", "attention_heads"): WHOLE,
    ("model", "token_dropout"): ["nonsense", "2", "0.88", "yes no"],
    ("output", "reuse"): ["nonsense", "2", "0.5", "yes no"],
    ("input", "fasta"): ["~nosuchuser/a.fasta"],
    ("input", "max_residues"): WHOLE,
    ("input", "long_sequences"): ["nonsense", "Truncate", "truncate error"],
    ("input", "unknown_residues"): ["nonsense", "X"],
    ("input", "duplicate_ids"): ["nonsense", "drop"],
    ("compute", "device"): ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:٣", "cuda:999999999999"],
    ("compute", "precision"): ["nonsense", "fp32", "float64"],
    ("compute", "tokens_per_pack"): [*(one for one in WHOLE if one != "0"), "1", "2"],
    ("compute", "threads"): ["nonsense", "1.5", "-1", "4097"],
    ("compute", "fused_attention"): ["nonsense", "auto"],
    ("compute", "compile"): ["nonsense", "2"],
    ("output", "folder"): ["~nosuchuser/embeddings"],
    ("output", "include"): ["nonsense", "mean nonsense", ",", "Mean"],
    ("output", "per_tok_dtype"): ["nonsense", "float64"],
    ("output", "checkpoint_seconds"): ["nonsense", "-1", "nan", "inf", "1e999"],
    ("output", "checkpoint_records"): WHOLE,
    ("database", "url"): ["~nosuchuser/runs.sqlite"],
    ("cluster", "ray"): ["local", "Auto", "head", "head:", ":6379", "ray://head:10001", "a b:1"],
    ("cluster", "workers"): ["nonsense", "1.5", "-1", "4097"],
    ("cluster", "threads_per_worker"): ["nonsense", "1.5", "-1", "4097"],
    ("cluster", "files"): ["nonsense", "Shared", "shared sent"],
}


def write(folder: Path, text: str) -> Path:
    config = folder / "config.ini"
    config.write_text(text, encoding="utf-8")
    return config


def refusal(config: Path, overrides: dict[str, str] | None = None) -> str:
    """The one line with which these settings are refused."""
    with pytest.raises(SettingsError) as caught:
        load_settings(config, overrides or {})
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- What holds when nothing, or something, is said


def test_an_empty_config_means_the_3b_model(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "")).model.esm_model == "esm2_t36_3B_UR50D"


def test_the_committed_config_says_the_3b_model() -> None:
    assert load_settings().model.esm_model == "esm2_t36_3B_UR50D"


def test_config_decides_and_flags_override_it(place: Place) -> None:
    place.set("model", "esm_model", "esm2_t6_8M_UR50D")
    assert load_settings(place.config).model.esm_model == "esm2_t6_8M_UR50D"
    flags = {"model.esm_model": "esm2_t12_35M_UR50D"}
    assert load_settings(place.config, flags).model.esm_model == "esm2_t12_35M_UR50D"


def test_an_empty_flag_says_nothing(place: Place) -> None:
    place.set("model", "esm_model", "esm2_t6_8M_UR50D")
    settings = load_settings(place.config, {"model.esm_model": " "})
    assert settings.model.esm_model == "esm2_t6_8M_UR50D"


def test_a_script_reads_config_then_set_then_flag(script: Script, place: Place) -> None:
    place.set("model", "esm_model", "esm2_t6_8M_UR50D")
    said = ["--set", "model.esm_model=esm2_t12_35M_UR50D"]
    flag = ["--esm-model", "esm2_t30_150M_UR50D"]
    assert script("detect", "--json").json["name"] == "esm2_t6_8M_UR50D"
    assert script("detect", "--json", *said).json["name"] == "esm2_t12_35M_UR50D"
    assert script("detect", "--json", *said, *flag).json["name"] == "esm2_t30_150M_UR50D"
    assert script("detect", "--json", *flag, *said).json["name"] == "esm2_t30_150M_UR50D"


def test_the_last_of_several_sets_holds(script: Script) -> None:
    said = ["--set", "model.repr_layers=1", "--set", "model.repr_layers=2 3"]
    answer = script("detect", "--json", "--esm-model", "esm2_t6_8M_UR50D", *said)
    assert answer.json["properties"]["repr_layers"]["value"] == [2, 3]


@pytest.mark.parametrize("said", ["nonsense", "model.esm_model", "esm_model=x", "=", ""])
def test_a_set_that_is_no_setting_is_refused(script: Script, said: str) -> None:
    answer = script("detect", f"--set={said}")
    assert answer.status == 2
    assert answer.error == f"--set {said}: not section.option=value"


def test_override_lays_flags_over_settings(place: Place) -> None:
    settings = override(load_settings(place.config), {"compute.threads": "3"})
    assert settings.compute.threads == 3
    assert settings.model == load_settings(place.config).model


def test_words_stand_between_spaces_or_commas(tmp_path: Path) -> None:
    config = write(tmp_path, "[model]\nrepr_layers = 0,3  -1\n[output]\ninclude = mean, bos\n")
    settings = load_settings(config)
    assert settings.model.repr_layers == [0, 3, -1]
    assert settings.output.include == ["mean", "bos"]


# ---- Paths


def path_in(settings: Settings, section: str, option: str) -> object:
    found = getattr(getattr(settings, section), option)
    return found[0] if isinstance(found, list) and len(found) == 1 else found


@pytest.mark.parametrize(("section", "option"), PATHS)
def test_paths_in_config_start_at_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, option: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    config = write(tmp_path, f"[{section}]\n{option} = some/file\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = path_in(load_settings(Path("../config.ini")), section, option)
    assert found == str(tmp_path / "some/file")
    assert found == path_in(load_settings(config), section, option)


@pytest.mark.parametrize(("section", "option"), PATHS)
def test_paths_in_flags_start_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, option: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    config = write(tmp_path, f"[{section}]\n{option} = some/file\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = load_settings(config, {f"{section}.{option}": "some/file"})
    assert path_in(settings, section, option) == str(tmp_path / "elsewhere/some/file")


@pytest.mark.parametrize(("section", "option"), PATHS)
def test_absolute_paths_stay(tmp_path: Path, section: str, option: str) -> None:
    config = write(tmp_path, f"[{section}]\n{option} = /some/file\n")
    assert path_in(load_settings(config), section, option) == "/some/file"


def test_a_tilde_behind_a_folder_is_a_name(
    script: Script, place: Place, small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    shutil.copy(SOME_PROTEINS, "~a.fasta")
    Path("~").mkdir()
    given = ["--esm-model", small_model, "--input", "./~a.fasta", "--output", "./~"]
    answer = script("embed", *given)
    assert answer.status == 0, answer.err
    assert (place.folder / "~" / "run-000001").is_dir()
    assert script("validate", "--run", "1", "--output", "./~/run-000001").status == 0


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = write(tmp_path, "[input]\nfasta = ~/a.fasta\n")
    assert load_settings(config).input.fasta == [str(tmp_path / "a.fasta")]


def test_released_names_and_database_urls_are_no_paths(tmp_path: Path) -> None:
    said = "[model]\nesm_model = esm2_t6_8M_UR50D\n[database]\nurl = sqlite:////here.sqlite\n"
    settings = load_settings(write(tmp_path, said))
    assert settings.model.esm_model == "esm2_t6_8M_UR50D"
    assert settings.database.url == "sqlite:////here.sqlite"


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("sqlite:///a/50%25 é.sqlite", "{folder}/a/50% é.sqlite"),
        ("sqlite+pysqlite:///runs.sqlite", "{folder}/runs.sqlite"),
        ("sqlite:////data/runs.sqlite", "/data/runs.sqlite"),
    ],
)
def test_the_path_of_a_database_url_starts_at_the_folder_of_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, found: str
) -> None:
    """Before, a relative one started at the current folder."""
    folder = tmp_path / "odd? %41"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    config = write(folder, f"[database]\nurl = {said}\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert database_path(load_settings(config).database.url) == Path(found.format(folder=folder))
    in_flags = load_settings(config, {"database.url": said}).database.url
    assert database_path(in_flags) == Path(found.format(folder=tmp_path / "elsewhere"))


def test_outputs_that_nobody_placed_go_to_the_project(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, ""))
    assert settings.output.folder == str(DEFAULT_CONFIG.parent / "embeddings")
    assert settings.database.url == str(DEFAULT_CONFIG.parent / "runs.sqlite")


SEVERAL = {
    "a.fasta": ["a.fasta"],
    "a.fasta b.fasta.gz": ["a.fasta", "b.fasta.gz"],
    "'x y.fasta' z\\ w.fa": ["x y.fasta", "z w.fa"],
    "a.fasta\n    b.fasta": ["a.fasta", "b.fasta"],
    "it's missing.fasta": ["it's missing.fasta"],
    "there is.fasta": ["there is.fasta"],
    "'there is'.fasta there is.fasta": ["there is.fasta", "there", "is.fasta"],
    "a.fasta -": ["a.fasta", "-"],
    "-": ["-"],
    "./-": ["-/"],
}


@pytest.mark.parametrize("said", SEVERAL)
def test_an_input_is_a_path_or_words_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there is.fasta").touch()
    expected = [one if one == "-" else str(tmp_path / one.strip("/")) for one in SEVERAL[said]]
    config = write(tmp_path, f"[input]\nfasta = {said}\n")
    assert load_settings(config).input.fasta == expected
    assert load_settings(DEFAULT_CONFIG, {"input.fasta": said}).input.fasta == expected


def test_the_paths_of_a_list_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = ["a b.fasta", "'c'", "", "-"]
    found = load_settings(DEFAULT_CONFIG, {"input.fasta": paths}).input.fasta
    assert found == [str(tmp_path / "a b.fasta"), str(tmp_path / "'c'"), "-"]


@pytest.mark.parametrize("said", ["", "''", " ''  \"\""])
def test_an_input_of_empty_words_says_nothing(place: Place, said: str) -> None:
    place.set("input", "fasta", "/data/a.fasta")
    assert load_settings(place.config, {"input.fasta": said}).input.fasta == ["/data/a.fasta"]
    assert load_settings(DEFAULT_CONFIG, {"input.fasta": said}).input.fasta is None


def test_a_run_that_stored_one_path_as_text_has_this_path(place: Place) -> None:
    stored = snapshot(load_settings(place.config))
    stored["input"]["fasta"] = "/data/some proteins.fasta"
    assert from_snapshot(stored).input.fasta == ["/data/some proteins.fasta"]


@pytest.mark.parametrize(
    "name", ["100%.fasta", "%(home)s.fasta", "a b  c.fasta", "protéines 蛋白.fasta", "${x}#;=.fa"]
)
def test_odd_names_stay_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path, f"[input]\nfasta = {name}\n")
    assert load_settings(config).input.fasta == [str(tmp_path / name)]
    settings = load_settings(config, {"input.fasta": name})
    assert settings.input.fasta == [str(tmp_path / name)]


# ---- What is refused


@pytest.mark.parametrize("section", ["modell", "Model", "DEFAULT", "default", " model"])
def test_unknown_sections_are_refused(tmp_path: Path, section: str) -> None:
    config = write(tmp_path, f"[{section}]\nesm_model = esm2_t6_8M_UR50D\n")
    assert refusal(config) == f"{config}: unknown section [{section}]"


def test_unknown_sections_in_flags_are_refused(place: Place) -> None:
    assert refusal(place.config, {"modell.esm_model": "x"}) == "flags: unknown section [modell]"


@pytest.mark.parametrize("section", list(SECTIONS))
def test_unknown_options_are_refused(tmp_path: Path, section: str) -> None:
    config = write(tmp_path, f"[{section}]\nnonsense = 1\n")
    assert refusal(config) == f"{config}: unknown option 'nonsense' in [{section}]"
    told = refusal(write(tmp_path, ""), {f"{section}.nonsense": "1"})
    assert told == f"flags: unknown option 'nonsense' in [{section}]"


def test_there_is_nonsense_for_every_option() -> None:
    assert sorted(NONSENSE) == sorted(OPTIONS)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [(*key, value) for key, values in NONSENSE.items() for value in values],
    ids=lambda text: text[:20],
)
def test_nonsense_is_refused_by_section_option_and_value(
    tmp_path: Path, section: str, option: str, value: str
) -> None:
    fact = f"[{section}] {option} = {value}: "
    assert fact in refusal(write(tmp_path, f"[{section}]\n{option} = {value}\n"))
    assert fact in refusal(write(tmp_path, ""), {f"{section}.{option}": value})


@pytest.mark.parametrize(("section", "option"), OPTIONS)
def test_values_over_several_lines_are_refused_in_one(
    tmp_path: Path, section: str, option: str
) -> None:
    value = "~nosuchuser\n  /x" if (section, option) in PATHS else "non\n  sense"
    told = refusal(write(tmp_path, f"[{section}]\n{option} = {value}\n"))
    assert f"[{section}] {option} = " in told


@pytest.mark.parametrize(("section", "option"), PATHS)
def test_a_nul_byte_in_a_path_is_refused(tmp_path: Path, section: str, option: str) -> None:
    told = refusal(write(tmp_path, ""), {f"{section}.{option}": "a\0b"})
    assert told == f"flags: [{section}] {option} has a NUL byte"


def test_repeated_layers_are_refused(place: Place) -> None:
    told = refusal(place.config, {"model.repr_layers": "1 2 3 2"})
    assert told == "[model] repr_layers: 2 is repeated"


def test_repeated_kinds_are_refused(place: Place) -> None:
    told = refusal(place.config, {"output.include": "mean bos mean"})
    assert told == "[output] include: mean is repeated"


def test_a_missing_config_is_refused(tmp_path: Path, script: Script) -> None:
    missing = tmp_path / "missing.ini"
    assert refusal(missing) == f"{missing}: no such file"
    answer = script("detect", "--config", missing)
    assert (answer.status, answer.error) == (2, f"{missing}: no such file")


def test_a_folder_as_config_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: {os.strerror(21)}"


def test_an_undecodable_config_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.ini"
    config.write_bytes(b"[model]\nesm_model = \xff\n")
    assert refusal(config) == f"{config}: not UTF-8 at byte 20"


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    """Notepad writes one. Before, the file was said to have no section."""
    config = write(tmp_path, "\ufeff[input]\nmax_residues = 500\n")
    assert load_settings(config).input.max_residues == 500


@pytest.mark.parametrize(
    "text",
    [
        "esm_model = esm2_t6_8M_UR50D\n",
        "[model\nesm_model = esm2_t6_8M_UR50D\n",
        "[model]\nesm_model\n",
        "[model]\nesm_model: esm2_t6_8M_UR50D\n",
        "[model]\nnum_layers = 1\nnum_layers = 2\n",
        "[model]\n[input]\n[model]\n",
    ],
)
def test_a_malformed_config_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    config = write(tmp_path, text)
    assert str(config) in refusal(config)


def accepts_or_refuses_in_one_line(config: Path, overrides: Overrides) -> None:
    try:
        settings = load_settings(config, overrides)
    except SettingsError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(settings, Settings)
        assert from_snapshot(json.loads(json.dumps(snapshot(settings)))) == settings


NEARLY_SETTINGS = st.one_of(
    st.text(),
    st.integers().map(str),
    st.floats().map(str),
    st.lists(st.integers(-3, 50)).map(lambda layers: ",".join(map(str, layers))),
    st.lists(st.sampled_from(["mean", "bos", "per_tok", "contacts"])).map(" ".join),
    st.from_regex(r"(https?|cuda|~\w*):?[/\d]*"),
)


@hypothesis.settings(deadline=None)
@given(option=st.sampled_from(OPTIONS), value=NEARLY_SETTINGS)
def test_any_text_is_a_setting_or_refused_in_one_line(option: tuple[str, str], value: str) -> None:
    accepts_or_refuses_in_one_line(DEFAULT_CONFIG, {".".join(option): value})


FLAGS = {
    "--esm-model": "model.esm_model",
    "--input": "input.fasta",
    "--output": "output.folder",
    "--database": "database.url",
    "--ray": "cluster.ray",
}


@hypothesis.settings(deadline=None)
@given(
    flags=st.dictionaries(st.sampled_from(sorted(FLAGS)), NEARLY_SETTINGS),
    option=st.sampled_from(OPTIONS),
    value=NEARLY_SETTINGS,
    layers=st.lists(st.integers(), min_size=1),
    kinds=st.lists(st.sampled_from(["mean", "bos", "per_tok", "contacts"]), min_size=1),
)
def test_what_flags_say_arrives_as_it_is_and_is_a_setting_or_refused_in_one_line(
    flags: dict[str, str], option: tuple[str, str], value: str, layers: list[int], kinds: list[str]
) -> None:
    parser = arguments(None)
    settings_arguments(parser, "esm_model", "input", "output", "include", "repr_layers", "ray")
    argv = [f"{flag}={text}" for flag, text in flags.items()]
    argv += [f"--set={'.'.join(option)}={value}", "--include", *kinds]
    argv += ["--repr-layers", *map(str, layers)]
    said = overrides(parser.parse_args(argv))
    expected: dict[str, object] = {".".join(option): value}
    for flag, text in flags.items():
        expected[FLAGS[flag]] = [text] if flag == "--input" else text
    expected["output.include"] = " ".join(kinds)
    expected["model.repr_layers"] = " ".join(map(str, layers))
    assert said == expected
    accepts_or_refuses_in_one_line(DEFAULT_CONFIG, said)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "config.ini"


@hypothesis.settings(deadline=None)
@given(option=st.sampled_from(OPTIONS), value=NEARLY_SETTINGS)
def test_any_text_in_config_is_a_setting_or_refused_in_one_line(
    scratch: Path, option: tuple[str, str], value: str
) -> None:
    scratch.write_text(f"[{option[0]}]\n{option[1]} = {value}\n", encoding="utf-8")
    accepts_or_refuses_in_one_line(scratch, {})


@hypothesis.settings(deadline=None)
@given(content=st.binary() | st.text("[]=model \n%#;\r\t").map(str.encode))
def test_any_file_is_a_config_or_refused_in_one_line(scratch: Path, content: bytes) -> None:
    scratch.write_bytes(content)
    accepts_or_refuses_in_one_line(scratch, {})


LARGE = st.integers(1, 2**31 - 1)
NAMES = st.text(
    st.characters(exclude_categories=("C", "Z")) | st.just(" "), min_size=1, max_size=20
)
# As pathlib writes it: `/data/./x` and `/data//x` are the file `/data/x`.
ANY_PATH = NAMES.map(lambda name: str(Path(f"/data/{name}/x"))).filter(
    lambda path: "://" not in path
)
# What every option may be, as it comes out.
VALID: dict[tuple[str, str], st.SearchStrategy[object]] = {
    ("model", "esm_model"): ANY_PATH | st.sampled_from(sorted(RELEASED)),
    ("model", "base_model"): ANY_PATH | st.sampled_from(sorted(RELEASED)),
    ("model", "source"): st.sampled_from(["fair-esm", "huggingface"]),
    ("model", "weights_directory"): ANY_PATH,
    ("model", "download_url"): st.from_regex(r"https?://[a-z0-9./%]+", fullmatch=True),
    ("model", "repr_layers"): st.lists(st.integers(-49, 48), min_size=1, unique=True),
    ("model", "num_layers"): LARGE,
    ("model", "hidden_dim"): LARGE,
    ("model", "attention_heads"): LARGE,
    ("model", "token_dropout"): st.booleans(),
    ("output", "reuse"): st.booleans(),
    ("input", "fasta"): st.lists(ANY_PATH | st.just("-"), min_size=1, max_size=3),
    ("input", "max_residues"): LARGE,
    ("input", "long_sequences"): st.sampled_from(["truncate", "error", "whole"]),
    ("input", "unknown_residues"): st.sampled_from(["error", "x"]),
    ("input", "duplicate_ids"): st.sampled_from(["error", "keep"]),
    ("compute", "device"): st.sampled_from(["auto", "cpu", "cuda", "cuda:0", "cuda:15"]),
    ("compute", "precision"): st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    ("compute", "tokens_per_pack"): st.just(0) | st.integers(3, 2**31 - 1),
    ("compute", "threads"): st.integers(0, 4096),
    ("compute", "fused_attention"): st.booleans(),
    ("compute", "compile"): st.booleans(),
    ("output", "folder"): ANY_PATH,
    ("output", "include"): st.permutations(["mean", "bos", "per_tok"]),
    ("output", "per_tok_dtype"): st.sampled_from(["float16", "float32"]),
    ("output", "checkpoint_seconds"): st.floats(0, allow_nan=False, allow_infinity=False),
    ("output", "checkpoint_records"): LARGE,
    ("database", "url"): ANY_PATH | ANY_PATH.map(lambda path: f"sqlite:///{path}"),
    ("cluster", "ray"): st.just("auto") | st.from_regex(r"[a-z0-9.-]+:[0-9]{1,5}", fullmatch=True),
    ("cluster", "workers"): st.integers(0, 4096),
    ("cluster", "threads_per_worker"): st.integers(0, 4096),
    ("cluster", "files"): st.sampled_from(["auto", "shared", "sent"]),
}


def test_every_option_is_tried_with_what_it_may_be() -> None:
    assert sorted(VALID) == sorted(OPTIONS)


@hypothesis.settings(deadline=None, max_examples=300)
@given(data=st.data(), option=st.sampled_from(OPTIONS))
def test_what_an_option_may_be_comes_out_as_said(
    scratch: Path, data: st.DataObject, option: tuple[str, str]
) -> None:
    section, name = option
    value = data.draw(VALID[option])
    join = shlex.join if name == "fasta" else " ".join
    said = join(map(str, value)) if isinstance(value, list) else str(value)
    scratch.write_text(f"[{section}]\n{name} = {said}\n", encoding="utf-8")
    for settings in (
        load_settings(scratch),
        load_settings(DEFAULT_CONFIG, {f"{section}.{name}": said}),
    ):
        assert getattr(getattr(settings, section), name) == value
        assert from_snapshot(json.loads(json.dumps(snapshot(settings)))) == settings


# ---- What a run keeps of its settings


def test_a_snapshot_of_settings_reads_back(place: Place) -> None:
    said = {
        "model.repr_layers": "0 -1",
        "model.token_dropout": "no",
        "output.include": "mean per_tok",
        "output.checkpoint_seconds": "0.25",
        "input.fasta": "'protéines %.fasta' -",
    }
    settings = load_settings(place.config, said)
    assert from_snapshot(json.loads(json.dumps(snapshot(settings)))) == settings


@pytest.mark.parametrize("option", OPTIONS)
def test_a_snapshot_holds_every_option(option: tuple[str, str]) -> None:
    settings = load_settings()
    assert snapshot(settings)[option[0]][option[1]] == asdict(settings)[option[0]][option[1]]


@pytest.mark.parametrize(
    "stored",
    [
        None,
        [],
        "settings",
        {"nonsense": {}},
        {"model": {"nonsense": 1}},
        {"model": {"num_layers": []}},
        {"output": {"include": [["mean"]]}},
        {"output": {"include": 3}},
    ],
)
def test_what_is_no_snapshot_is_refused(stored: object) -> None:
    with pytest.raises(SettingsError) as caught:
        from_snapshot(stored)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("section", [3, "model", [1], ["ab"]])
def test_a_snapshot_whose_section_is_no_object_is_refused(section: object) -> None:
    with pytest.raises(SettingsError, match="model"):
        from_snapshot({"model": section})


# ---- The committed config.ini


def test_the_committed_config_says_the_defaults(tmp_path: Path) -> None:
    assert load_settings(DEFAULT_CONFIG) == load_settings(write(tmp_path, ""))


def test_the_committed_config_has_every_option_in_order() -> None:
    found, section = [], ""
    for line in DEFAULT_CONFIG.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            found.append((section, line.partition("=")[0].strip()))
    assert found == OPTIONS


def test_every_option_of_the_committed_config_is_under_a_comment() -> None:
    explained = False
    for line in DEFAULT_CONFIG.read_text().splitlines():
        if not line or line.startswith("["):
            explained = False
        elif line.startswith("#"):
            explained = True
        else:
            assert explained, line
