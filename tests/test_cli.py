"""Exit codes and messages that every command-line program shares."""

import pytest

from deepseek_jax import cli
from deepseek_jax.errors import ConfigError


def _status(main, argv=()):
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, argv)
    return exit_.value.code


def test_success_and_returned_status():
    assert _status(lambda argv: None) == 0
    assert _status(lambda argv: 3) == 3
    assert _status(lambda argv: len(argv), ["a", "b"]) == 2


def test_user_error_has_no_traceback(capsys):
    def main(argv):
        raise ConfigError("top_k=9: lower it")

    assert _status(main) == 2
    assert capsys.readouterr().err == "error: top_k=9: lower it\n"


def test_interrupt():
    def main(argv):
        raise KeyboardInterrupt

    assert _status(main) == 130


def test_a_bug_keeps_its_traceback():
    def main(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        cli.run(main, [])


def test_parser_names_the_module_and_refuses_abbreviations(capsys):
    parser = cli.parser("deepseek_jax.generation", "Streams text.")
    parser.add_argument("--checkpoint", default="x", help="a folder")
    assert "python -m deepseek_jax.generation" in parser.format_help()
    assert "(default: x)" in parser.format_help()
    for argv, message in (
        (["--check=y"], "unknown flag --check: did you mean '--checkpoint'"),
        (["y"], "'y' belongs to no flag"),
        (["--checkpoint"], "expected one"),
    ):
        with pytest.raises(ConfigError, match=message):
            parser.parse_args(argv)


@pytest.mark.parametrize(
    ("number", "text", "expected"),
    [
        (cli.number(), "1e-3", 1e-3),
        (cli.number(int, least=1), "1e3", 1000),
        (cli.number(least=0), "0", 0.0),
        (cli.number(above=0, most=1), "1", 1.0),
        (cli.number(), "nan", "'nan': must be a number"),
        (cli.number(), "inf", "'inf': must be a number"),
        (cli.number(int), "2.5", "'2.5': must be a whole number"),
        (cli.number(int), "true", "'true': must be a whole number"),
        (cli.number(int, least=1), "0", "'0': must be a whole number, at least 1"),
        (cli.number(above=0, most=1), "0", "'0': must be a number, above 0 and at most 1"),
        (cli.number(above=0, most=1), "1.5", "above 0 and at most 1"),
        (cli.number(), "", "must be a number"),
    ],
)
def test_numbers_of_flags(number, text, expected):
    parser = cli.parser("deepseek_jax", "Tries a flag.")
    parser.add_argument("--x", type=number)
    if not isinstance(expected, str):
        value = parser.parse_args([f"--x={text}"]).x
        assert value == expected and type(value) is type(expected)
        return
    with pytest.raises(ConfigError, match=f"argument --x: .*{expected}"):
        parser.parse_args([f"--x={text}"])
