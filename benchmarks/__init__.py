import utils  # noqa: F401, before the libraries that read the environment
