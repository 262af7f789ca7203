"""Messages and exit codes."""

from graft.studio import errors


def test_message_tells_what_why_and_what_to_do() -> None:
    error = errors.DataError("photos", "the folder is empty", "Put pictures into it")
    assert str(error) == "photos: the folder is empty. Put pictures into it"
    assert (error.given, error.reason, error.remedy) == ("photos", "the folder is empty", "Put pictures into it")


def test_exit_codes_follow_the_tree() -> None:
    tree = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    assert errors.GraftError.exit_code == 1
    for name, error in tree.items():
        assert issubclass(error, errors.GraftError)
        assert name in (errors.__doc__ or ""), "the tree in the docstring is not complete"
        assert error.exit_code == (1 if error is errors.GraftError else 2)
