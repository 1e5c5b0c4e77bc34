"""An HTTP server over the public API: OpenAI's and Anthropic's protocols, and a page.

All modules use only the public API of :class:`flash_moe.Model`. The extra ``server`` installs Starlette and uvicorn.
"""
