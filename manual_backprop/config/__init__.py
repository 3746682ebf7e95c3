"""Configuration: the schema and its rules, composition by Hydra, validation, the command line and its help.

`schema` holds the dataclasses, `network` the part of them that describes a network (`CustomTransformerConfig`), `rules`
what a value may be, `validation` turns a mapping into a `RunConfig` or a list of violations, `composition` asks Hydra.
Not here: what a value leads to; that is built in `training`.
Needs no torch.
May import: common.
"""
