"""Short texts in the languages and ages that encodings are tried with."""

from __future__ import annotations

# made up, as novels of the web are
MODERN = """第三章 夜访
“你怎么还没走？”林雨推开门，看见他站在窗边，手里拿着一封没有拆开的信。
他没有回头，只是轻轻地说：“我在等一个电话。今天晚上，飞船就要离开这座城市了。”
她沉默了一会儿，终于忍不住问道：“那我们呢？”
房间里很安静，只听得见墙上的钟在走。窗外的灯一盏一盏地灭了，像是有人在慢慢地关上整个世界。他笑了笑，
把信放在桌上，
转过身来看着她的眼睛，说：“等我回来的时候，你会明白的。”
可是谁都知道，从那颗星星回来，至少要四十年。
"""
# 紅樓夢, the beginning
TRADITIONAL = """此開卷第一回也。作者自云：因曾歷過一番夢幻之後，故將真事隱去，而借「通靈」之說，
撰此《石頭記》一書也。故曰「甄士隱」云云。
但書中所記何事何人？自又云：「今風塵碌碌，一事無成，忽念及當日所有之女子，一一細考較去，覺其行止見識，
皆出於我之上。
何我堂堂鬚眉，誠不若彼裙釵哉？實愧則有餘，悔又無益之大無可如何之日也！」當此，則自欲將已往所賴天恩祖德，
錦衣紈褲之時，飫甘饜肥之日，
背父兄教育之恩，負師友規訓之德，以致今日一技無成，半生潦倒之罪，編述一集，以告天下人。
"""
# 千字文 and 論語, as a book without modern marks prints them
CLASSICAL = """\
天地玄黃宇宙洪荒日月盈昃辰宿列張寒來暑往秋收冬藏閏餘成歲律呂調陽雲騰致雨露結為霜金生麗水玉出崑岡
劍號巨闕珠稱夜光果珍李柰菜重芥薑海鹹河淡鱗潛羽翔龍師火帝鳥官人皇始制文字乃服衣裳推位讓國有虞陶唐
子曰學而時習之不亦說乎有朋自遠方來不亦樂乎人不知而不慍不亦君子乎有子曰其為人也孝弟而好犯上者鮮矣
"""
# 夏目漱石, 吾輩は猫である; 宮沢賢治, 銀河鉄道の夜: their beginnings
JAPANESE = """吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。
何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。
吾輩はここで始めて人間というものを見た。
しかもあとで聞くとそれは書生という人間中で一番獰悪な種族であったそうだ。
この書生というのは時々我々を捕えて煮て食うという話である。
しかしその当時は何という考もなかったから別段恐しいとも思わなかった。
「ではみなさんは、そういうふうに川だと云われたり、
乳の流れたあとだと云われたりしていたこのぼんやりと白いものがほんとうは何かご承知ですか。」
先生は、黒板に吊した大きな黒い星座の図の、上から下へ白くけぶった銀河帯のようなところを指しながら、
みんなに問をかけました。
"""
# 이효석, 메밀꽃 필 무렵: the beginning
KOREAN = """여름 장이란 애시당초에 글러서, 해는 아직 중천에 있건만 장판은 벌써 쓸쓸하고 더운 햇발이
벌여 놓은 전 휘장 밑으로 등줄기를 훅훅 볶는다.
마을 사람들은 거의 돌아간 뒤요, 팔리지 못한 나무꾼 패가 길거리에 궁싯거리고들 있으나, 석유병이나 받고
고깃마리나 사면 족할 이 축들을 바라고
언제까지든지 버티고 있을 법은 없다. 춥춥스럽게 날아드는 파리 떼도, 장난꾼 각다귀들도 귀찮다.
"""
# made up
ENGLISH = """“You came back,” she said, and didn’t smile. The captain put the letter on the table —
unopened — and
looked at the harbour. “I said I would.” Nobody spoke… The ship’s bell rang twice, as it had on the
night they left,
and the rain went on falling over the roofs of the town as if it had never done anything else.
"""
FRENCH = """Il était une fois, dans un pays où la mer était très froide, une vieille femme qui n’avait
jamais rien
oublié. « À quoi ça sert ? » demandait son frère, déjà fatigué d’être né. Les élèves, eux, préféraient
la forêt.
"""
RUSSIAN = """Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива
по-своему. Всё смешалось
в доме Облонских. Жена узнала, что муж был в связи с бывшею в их доме француженкою-гувернанткой, и
объявила мужу, что не
может жить с ним в одном доме.
"""
