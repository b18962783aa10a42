// Every text of the page, in English and in Chinese; which one is shown is decided by the browser's language.

const TEXTS = {
  skip: ["Skip to the question", "跳到提问框"],
  model: ["Model", "模型"],
  second: ["Second model", "对比的模型"],
  compare: ["Compare", "对比"],
  settings: ["Settings", "设置"],
  clear: ["Clear", "清空"],
  welcome: ["Ask about a picture", "看图提问"],
  how: [
    "Drop pictures anywhere on this page, paste them, or choose them. Then ask.",
    "把图片拖到页面任意位置，或粘贴、选择图片，然后提问。",
  ],
  choose: ["Choose pictures", "选择图片"],
  keys: [
    "Enter sends, Shift+Enter starts a new line, Esc stops the answer.",
    "Enter 发送，Shift+Enter 换行，Esc 停止回答。",
  ],
  conversation: ["Conversation", "对话"],
  pictures: ["Pictures of the next question", "下一个问题的图片"],
  picture: ["Picture", "图片"],
  question: ["Your question", "输入问题"],
  find: [
    "Ask where something is: marks the selected words",
    "询问位置：标记选中的文字",
  ],
  send: ["Send", "发送"],
  stop: ["Stop", "停止"],
  system: ["System message", "系统提示"],
  temperature: ["Temperature", "温度"],
  tokens: ["Most tokens of an answer", "回答的最大 token 数"],
  service: ["the service's", "由服务决定"],
  greedy: [
    "At temperature 0 a question always gets the same answer, so that two models can be compared.",
    "温度为 0 时，同一问题的回答始终相同，便于对比两个模型。",
  ],
  done: ["Done", "完成"],
  close: ["Close", "关闭"],
  keyTitle: ["This service asks for a key", "此服务需要密钥"],
  key: ["API key", "API 密钥"],
  keyKept: ["It is kept in this tab only.", "仅保存在当前标签页中。"],
  drop: ["Drop the pictures here", "松开即可添加图片"],
  remove: ["Remove {name}", "移除 {name}"],
  enlarge: ["Enlarge {name}", "放大 {name}"],
  you: ["You", "你"],
  copy: ["Copy", "复制"],
  curl: ["Copy as curl", "复制为 curl"],
  copied: ["Copied.", "已复制。"],
  copiedCurl: ["Copied: paste it in bash.", "已复制，可粘贴到 bash 中运行。"],
  large: ["It is {size} long, for the pictures are in it.", "内含图片，长度 {size}。"],
  needsKey: ["It reads the key from $API_KEY.", "密钥取自 $API_KEY。"],
  notCopied: ["The browser did not let the page copy.", "浏览器不允许复制。"],
  again: ["Try again", "重试"],
  boxes: ["Boxes, in pixels", "框（像素坐标）"],
  malformed: ["{count} boxes of the answer cannot be read.", "回答中有 {count} 个框无法解析。"],
  tokensIn: ["{prompt} + {answer} tokens", "{prompt} + {answer} 个 token"],
  seconds: ["{seconds} s", "{seconds} 秒"],
  waiting: ["Waiting …", "等待中……"],
  stopped: ["Stopped.", "已停止。"],
  cut: ["Cut at the most tokens of an answer.", "达到最大 token 数，回答被截断。"],
  empty: ["The answer is empty.", "回答为空。"],
  filtered: ["The answer ended: {reason}.", "回答结束：{reason}。"],
  noPicture: ["{name} is no picture that can be sent.", "{name} 不是可以发送的图片。"],
  unseen: ["This browser cannot show {name}; the model may read it.", "浏览器无法显示 {name}，但模型可能可以读取。"],
  notKept: [
    "The browser has no room for this conversation: it will not survive a reload.",
    "浏览器存储空间不足，刷新后此对话将丢失。",
  ],
  askClear: ["Remove this conversation?", "确定清空此对话吗？"],
  out: [
    "The service cannot be reached. Is it still running?",
    "无法连接服务，请确认服务仍在运行。",
  ],
  broken: [
    "The answer broke off: the service went away.",
    "回答中断：与服务的连接已断开。",
  ],
  refused: ["The service refused: {message}", "服务拒绝了请求：{message}"],
  failed: ["The service failed: {message}", "服务出错：{message}"],
  busy: [
    "The service is busy. Try again in {seconds} s.",
    "服务繁忙，请在 {seconds} 秒后重试。",
  ],
  ending: [
    "The service is shutting down and takes no new question.",
    "服务正在关闭，不再接受新问题。",
  ],
  noModels: ["The service names no model.", "服务没有可用的模型。"],
  rehearsal: [
    "{model} comes from a rehearsal on nano: its answers are not for use.",
    "{model} 来自 nano 演练，其回答不可用于实际场景。",
  ],
};

export const CHINESE = (navigator.languages?.[0] ?? navigator.language ?? "en").toLowerCase().startsWith("zh");

// say("busy", { seconds: 3 })
export function say(name, values = {}) {
  const text = TEXTS[name][CHINESE ? 1 : 0];
  return text.replace(/\{(\w+)\}/g, (_, key) => String(values[key]));
}

export function sizeOf(bytes) {
  return bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// Fills in what index.html leaves to the language.
export function fillTexts() {
  document.documentElement.lang = CHINESE ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const [key, attribute] of [["label", "aria-label"], ["title", "title"], ["placeholder", "placeholder"]]) {
    for (const element of document.querySelectorAll(`[data-${key}]`)) element.setAttribute(attribute, say(element.dataset[key]));
  }
}
