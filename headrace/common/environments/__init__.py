"""What a task's `rollout` uses: the conversation with the model (`Chat`), its replies, and schemas of tools.

`async def rollout(self, chat: Chat, ticket: Ticket)` awaits `chat.reply(...)`. A plain `def rollout` runs in a thread
and gets a `BlockingChat`, whose calls block. The HTTP client behind both is imported by the environment worker alone,
so that a task's module loads quickly in the learner too.
"""

from headrace.common.environments.chat import BlockingChat, Chat, ChatError
from headrace.common.environments.reply import BlockingReply, Reply
from headrace.common.environments.schema import schema
from headrace.common.environments.tool_calls import ToolCall

__all__ = ["BlockingChat", "BlockingReply", "Chat", "ChatError", "Reply", "ToolCall", "schema"]
