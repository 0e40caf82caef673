"""Settings: flat names, precedence, round trip through the environment, and errors that name the variable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from perennial.storage.objects.s3_settings import S3Settings
from perennial.streams.paths import cache_dir
from perennial.streams.settings import Settings, SettingsError, all_fields, load_settings
from perennial.streams.settings.model_groups import TrainingSettings

SECRET = "a-secret-of-s3"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No variable of ours is set, and there is no .env in the working directory."""
    for name in list(os.environ):
        if name.startswith(("PERENNIAL_", "AWS_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_flat_names_reach_their_groups():
    settings = Settings.of(kafka="a:1", store="/objects", max_age_s=2, rank=4, poll_s=0.5, clock_settle_s=1, stall_s=9)
    assert settings.kafka.bootstrap == "a:1"
    assert settings.store.uri == "/objects"
    assert settings.curate.max_age_s == 2.0
    assert settings.training.rank == 4
    assert settings.serving.poll_s == 0.5
    assert settings.retain.clock_settle_s == 1.0
    assert settings.observe.stall_s == 9.0
    assert settings.curate.max_adapters == Settings().curate.max_adapters


def test_flat_names_are_unique_and_every_variable_sets_its_field(monkeypatch):
    variables = [variable for _, variable, _ in all_fields()]
    assert len(set(variables)) == len(variables)
    assert {"PERENNIAL_KAFKA", "PERENNIAL_STORE", "PERENNIAL_MAX_AGE_S"} <= set(variables)
    for group, variable, field in all_fields():
        if group == "kafka_security":  # settings that belong together: see test_kafka_security.py
            continue
        if variable in {"PERENNIAL_LEARNED_STARTS", "PERENNIAL_TRAIN_OVER_SHARED"}:  # names shared adapters
            monkeypatch.setenv("PERENNIAL_SHARED_ADAPTERS", "1")
        name = next(name for name, info in getattr(Settings(), group).__class__.model_fields.items() if info is field)
        value = {
            "data_dir": "/elsewhere",
            "device": "cpu",
            "dtype": "bf16",
            "log_level": "debug",
            "learn_turns": "true",
            "slow_average": "0.5",
            "correction_votes": "history",
            "replay_places": "examples",
            "second_approver": "off",
            "bootstrap": "a:1",
            "maven_url": "https://mirror",
            "internal_key": SECRET * 3,
            "internal_key_previous": SECRET * 3,
        }.get(name, "1")
        monkeypatch.setenv(variable, value)
        found = getattr(getattr(Settings(), group), name)
        shown = found.get_secret_value() if isinstance(found, SecretStr) else str(found)
        assert shown in {value, f"{value}.0", "True"}, variable
        monkeypatch.delenv(variable)


def test_a_given_value_goes_before_the_environment_and_that_before_the_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("PERENNIAL_KAFKA=file:1\nPERENNIAL_STORE=/file\nPERENNIAL_RANK=3\nOTHER=x\n")
    monkeypatch.setenv("PERENNIAL_KAFKA", "environment:1")
    monkeypatch.setenv("PERENNIAL_STORE", "/environment")
    settings = Settings.of(kafka="given:1")
    assert (settings.kafka.bootstrap, settings.store.uri, settings.training.rank) == ("given:1", "/environment", 3)
    assert Settings().training.rank == load_settings().training.rank == 3
    assert Settings.of(env_file=None).training.rank == 16
    (tmp_path / "other.env").write_text("PERENNIAL_RANK=5\n")
    assert Settings.of(env_file="other.env").training.rank == 5


def test_replace_changes_a_checked_copy(tmp_path):
    settings = Settings.of(kafka="a:1", rank=4)
    changed = settings.replace(kafka="b:1", poll_s=1, data_dir=str(tmp_path))
    assert (changed.kafka.bootstrap, changed.serving.poll_s, changed.training.rank) == ("b:1", 1.0, 4)
    assert changed.store.data_dir == Path(tmp_path)
    assert (settings.kafka.bootstrap, settings.serving.poll_s) == ("a:1", 5.0)
    assert settings.replace() == settings
    with pytest.raises(ValidationError, match="greater than 0"):
        settings.replace(rank=0)


def test_replace_does_not_look_at_the_environment(monkeypatch, tmp_path):
    settings = Settings.of(kafka="a:1", rank=4)
    (tmp_path / ".env").write_text("PERENNIAL_PARTITIONS=7\n")
    monkeypatch.setenv("PERENNIAL_KAFKA", "environment:1")
    monkeypatch.setenv("PERENNIAL_REPLICATION", "none")
    changed = settings.replace(topic_prefix="test-")
    assert changed.kafka == settings.kafka.model_copy(update={"topic_prefix": "test-"})


def test_an_unknown_name_is_refused():
    for name in ("max_age", "bootstrap", "uri", "curate"):
        for refuse in (Settings.of, load_settings, Settings().replace):
            with pytest.raises(TypeError, match=f"no such setting: {name}; allowed: .*max_age_s"):
                refuse(**{name: 1})
    with pytest.raises(ValidationError):
        Settings(max_age_s=1)


def test_the_environment_gives_another_process_the_same_settings(monkeypatch):
    settings = Settings.of(
        kafka="a:1,b:2", store="s3://bucket/x", topic_prefix="p-", max_age_s=0.25, learn_turns=True, rank=4, seed=-1,
        data_dir="/data/with space", device="cpu", learning_rate=1e-5, min_gain_nats=-50, log_level="debug",
    )  # fmt: skip
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings(env_file=None) == settings
    secrets = {
        "PERENNIAL_INTERNAL_KEY", "PERENNIAL_INTERNAL_KEY_PREVIOUS", "PERENNIAL_KAFKA_PASSWORD", "PERENNIAL_SIGNING_KEY",
    }  # fmt: skip
    assert set(settings.environment()) == {variable for _, variable, _ in all_fields()} - secrets


def test_the_internal_key_is_shown_nowhere_and_is_long_enough(monkeypatch):
    monkeypatch.setenv("PERENNIAL_INTERNAL_KEY", SECRET * 3)
    monkeypatch.setenv("PERENNIAL_INTERNAL_KEY_PREVIOUS", "")
    settings = Settings()
    assert settings.security.keys() == settings.replace(max_age_s=1).security.keys() == ((SECRET * 3).encode(),)
    shown = (repr(settings), settings.model_dump_json(), str(settings.environment()), str(settings))
    assert not any(SECRET in text for text in shown)
    monkeypatch.setenv("PERENNIAL_INTERNAL_KEY", short := SECRET[:31])
    with pytest.raises(SettingsError, match="PERENNIAL_INTERNAL_KEY is not usable") as raised:
        load_settings()
    assert short not in f"{raised.value} {raised.value.__cause__}"
    monkeypatch.setenv("PERENNIAL_INTERNAL_KEY", "")
    monkeypatch.setenv("PERENNIAL_INTERNAL_KEY_PREVIOUS", SECRET * 3)
    assert Settings().security.keys() == ()


def test_credentials_of_s3_are_read_and_shown_nowhere(monkeypatch):
    monkeypatch.setenv("PERENNIAL_S3_ENDPOINT", "minio:9000")
    monkeypatch.setenv("PERENNIAL_S3_SECRET_KEY", SECRET)
    settings = Settings()
    assert settings.s3.endpoint == "minio:9000"
    assert settings.s3.secret_key.get_secret_value() == SECRET
    assert "s3" not in settings.model_dump()
    shown = (repr(settings), settings.model_dump_json(), str(settings.environment()), str(settings))
    assert not any("minio:9000" in text or SECRET in text for text in shown)
    other = S3Settings.from_env({"PERENNIAL_S3_ENDPOINT": "other:9000"})
    assert settings.replace(s3=other, rank=2).s3.endpoint == Settings.of(s3=other).s3.endpoint == "other:9000"
    assert settings.replace(rank=2).s3 == settings.s3


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PERENNIAL_RANK", "many"), ("PERENNIAL_MAX_AGE_S", "0"), ("PERENNIAL_MAX_AGE_S", "nan"),
        ("PERENNIAL_TOPIC_PREFIX", "a b"), ("PERENNIAL_DEVICE", "tpu"), ("PERENNIAL_METRICS_PORT", "65536"),
        ("PERENNIAL_REPLAY_SHARE", "1.5"), ("PERENNIAL_LEARN_TURNS", "maybe"), ("PERENNIAL_STEPS", ""),
        ("PERENNIAL_MIN_GAIN_NATS", "nan"), ("PERENNIAL_LEARNING_RATE", "inf"),
    ],
)  # fmt: skip
def test_an_unusable_variable_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    error = caught.value
    assert error.exit_code == 2
    assert f"{variable} is not usable" in str(error)
    assert f"correct or unset {variable}" in str(error)
    assert error.got == value
    assert error.allowed


@pytest.mark.parametrize(
    ("name", "variable"), [("kafka", "PERENNIAL_KAFKA"), ("store", "PERENNIAL_STORE"), ("rank", "PERENNIAL_RANK")]
)
def test_an_unusable_value_that_is_given_names_its_variable(name, variable):
    with pytest.raises(SettingsError, match=f"^{variable} is not usable; got: ") as caught:
        load_settings(**{name: ["x"]})
    assert caught.value.remedy == f"correct or unset {variable}"


def test_what_is_required_names_its_variable():
    with pytest.raises(SettingsError, match="PERENNIAL_KAFKA is empty"):
        Settings().kafka.require_bootstrap()
    with pytest.raises(SettingsError, match="PERENNIAL_STORE is empty"):
        Settings().store.require_uri()
    settings = Settings.of(kafka="a:1", store="/objects", topic_prefix="p-")
    assert (settings.kafka.require_bootstrap(), settings.store.require_uri()) == ("a:1", "/objects")
    assert settings.kafka.topic("examples") == "p-examples"


def test_settings_cannot_be_changed_in_place():
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.training.rank = 3
    with pytest.raises(ValidationError):
        settings.training = TrainingSettings()


def test_every_setting_is_described():
    for _, variable, field in all_fields():
        assert field.description, variable


def test_s3_is_read_from_the_env_file_too_and_the_environment_comes_first(tmp_path, monkeypatch):
    for name in S3Settings.model_fields.values():
        for variable in name.validation_alias.choices:
            monkeypatch.delenv(variable, raising=False)
    file = tmp_path / "variables"
    file.write_text(f"PERENNIAL_S3_ENDPOINT=from-file:9000\nPERENNIAL_S3_SECRET_KEY={SECRET}\n")
    assert Settings.of(env_file=str(file)).s3.endpoint == "from-file:9000"
    assert Settings.of(env_file=str(file)).s3.secret_key.get_secret_value() == SECRET
    monkeypatch.setenv("PERENNIAL_S3_ENDPOINT", "minio:9000")
    assert Settings.of(env_file=str(file)).s3.endpoint == "minio:9000"
    assert Settings.of(env_file=None).s3.secret_key.get_secret_value() == ""


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("localhost:9092", "localhost:9092"), ("PLAINTEXT://127.0.0.1:19392", "127.0.0.1:19392"),
        ("kafka://broker:1/", "broker:1"), (" a:1 , plaintext://b:2,", "a:1,b:2"), ("broker", "broker:9092"),
        ("[::1]:9092, [0:0:0:0:0:0:0:1]:9092", "[::1]:9092"), ("KAFKA://[FE80::1]", "[fe80::1]:9092"), (" ", ""),
    ],
)  # fmt: skip
def test_case_21_every_client_gets_one_spelling_of_the_brokers(monkeypatch, given, read):
    """PLAINTEXT://host:port reached every command and intake, and ended the role streams in a traceback."""
    monkeypatch.setenv("PERENNIAL_KAFKA", given)
    assert load_settings().kafka.bootstrap == read


@pytest.mark.parametrize(
    "given",
    ["SSL://a:1", "SASL_PLAINTEXT://a:1", "a:b", "a:0", "a:65536", "::1:9092", "[::x]:1", "a b:1", ",", "a:1;b:1"],
)
def test_case_21_an_unusable_spelling_of_the_brokers_is_refused(monkeypatch, given):
    monkeypatch.setenv("PERENNIAL_KAFKA", given)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert caught.value.got == given
    assert "host:port[,host:port]" in caught.value.allowed
    assert "PERENNIAL_KAFKA" in caught.value.remedy


def test_case_18_a_tilde_is_the_home_folder_for_every_reader_of_a_path(monkeypatch, tmp_path):
    """PERENNIAL_DATA_DIR=~/x put Kafka into ./~/x and the store into $HOME/x."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".env").write_text("PERENNIAL_DATA_DIR=~/data\nPERENNIAL_STORE=~/objects\nPERENNIAL_S3_CA_FILE=~/ca\n")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    settings = load_settings()
    home = tmp_path / "home"
    assert (settings.store.data_dir, settings.store.uri) == (home / "data", str(home / "objects"))
    assert settings.s3.ca_file == str(home / "ca")
    assert cache_dir() == home / "cache" / "perennial"
    assert settings.replace(data_dir="~/other").store.data_dir == home / "other"
    monkeypatch.setenv("XDG_DATA_HOME", "~/share")
    monkeypatch.setenv("PERENNIAL_DATA_DIR", "")  # set to nothing is not the working directory
    assert load_settings().store.data_dir == home / "share" / "perennial"
    assert load_settings(store="s3://bucket/~").store.uri == "s3://bucket/~"


def test_case_18_the_home_of_an_unknown_user_is_refused(monkeypatch):
    for name in ("DATA_DIR", "STORE"):
        with pytest.raises(SettingsError, match=f"PERENNIAL_{name} is not usable") as caught:
            load_settings(**{name.lower(): "~no-such-user/x"})
        assert caught.value.got == "~no-such-user/x"


def test_case_06_an_env_file_that_cannot_be_read_is_no_traceback(tmp_path):
    (tmp_path / ".env").write_bytes(b"PERENNIAL_KAFKA=\xff:1\n")
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        load_settings()


def test_case_07_a_byte_order_mark_does_not_hide_the_first_variable(tmp_path):
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfPERENNIAL_KAFKA=a:1\n")
    assert load_settings().kafka.bootstrap == "a:1"
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfPERENNIAL_S3_ENDPOINT=b:1\n")
    assert load_settings().s3.endpoint == "b:1"


def test_case_18_a_user_without_a_home_can_use_every_command(monkeypatch, tmp_path):
    """A container that runs as a user without an entry in passwd ended in a RuntimeError, also to publish."""

    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert load_settings(kafka="a:1").store.data_dir == tmp_path / ".perennial" / "share"
    assert cache_dir() == tmp_path / ".perennial" / ".cache"
