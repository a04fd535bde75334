from mm_registry.hooks import hookimpl


@hookimpl
def post_build(role, model_id, model):
    if role == "predictor":
        model.prepared = True
