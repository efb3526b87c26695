"""Configuration schemas: frozen, documented, validated. The defaults live in `conf/`."""
