from samlove.predict import load as load

__version__: str
