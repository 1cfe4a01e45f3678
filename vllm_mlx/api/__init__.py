"""The wire: schemas, routes, streams, errors. `create_app` in `app` joins them."""
