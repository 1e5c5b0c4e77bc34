"""An HTTP server over the public API: OpenAI's and Anthropic's protocols, and a page.

Every module here uses :class:`flash_moe.Model` as any application does. Starlette and uvicorn come with the extra
``server``.
"""
