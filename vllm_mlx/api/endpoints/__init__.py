"""One file per group of paths. Each offers `router(context) -> APIRouter` and is found by its place in this folder."""
