"""ComfyUI's entry point. Nothing is imported before ComfyUI asks for the nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import TRTExtension

    return TRTExtension()
