// What the page says, in English and Chinese.
export const STRINGS = {
  en: {
    new: "New chat", theme: "Theme", settings: "Settings", system: "System prompt", temperature: "Temperature", seed: "Seed",
    max_tokens: "Most tokens", api_key: "API key", probabilities: "Show token probabilities", placeholder: "Message…  (Enter sends, Shift+Enter: new line)",
    send: "Send", stop: "Stop", copy: "Copy", copied: "Copied", edit: "Edit", regenerate: "Regenerate", remove: "Delete",
    untitled: "New chat", welcome: "What shall we talk about?", cached: "from cache", tokens: "tokens", first: "first token", cut: "cut: most tokens reached", stopped: "stopped",
    context_full: "cut: the context is full", remove_confirm: "Delete this conversation?", context: "Context",
    examples: ["Why is the sky blue?", "Name three rivers of China.", "Write a haiku about water."],
  },
  zh: {
    new: "新对话", theme: "主题", settings: "设置", system: "系统提示", temperature: "温度", seed: "随机种子",
    max_tokens: "最多词元", api_key: "API 密钥", probabilities: "显示词元概率", placeholder: "输入消息…（回车发送，Shift+回车换行）",
    send: "发送", stop: "停止", copy: "复制", copied: "已复制", edit: "编辑", regenerate: "重新生成", remove: "删除",
    untitled: "新对话", welcome: "想聊点什么？", cached: "来自缓存", tokens: "词元", first: "首词元", cut: "已截断：达到最多词元", stopped: "已停止",
    context_full: "已截断：上下文已满", remove_confirm: "删除这个对话？", context: "上下文",
    examples: ["天空为什么是蓝色的？", "说出中国的三条河流。", "写一首关于水的短诗。"],
  },
};
