"""The words that made-up fans write, in Korean and English: of each type of fan, of everybody, and artists.

Plain data for `synthetic`. The artists' names are real, what fans are said to think of them is not.
"""

from __future__ import annotations

# A type of fan: words in Korean, words in English.
TYPES: dict[str, tuple[str, str]] = {
    "concert": (
        "콘서트 티켓 응원봉 스탠딩 앵콜 떼창 좌석 공연장 셋리스트 투어 현장 예매 입장 막콘",
        "concert ticket lightstick standing encore crowd seat venue setlist tour live stage queue arena",
    ),
    "charts": (
        "스밍 음원 차트 투표 순위 일위 조회수 총공 스트리밍 기록 시상식 득표 멜론 집계",
        "streaming chart vote ranking first views record award playlist billboard milestone digital "
        "daily goal",
    ),
    "albums": (
        "앨범 포토카드 언박싱 포카 교환 양도 굿즈 특전 예약 버전 공구 택배 포장 시세",
        "album photocard unboxing trade collection merch preorder version sleeve binder package "
        "shipping rare price",
    ),
    "dance": (
        "안무 커버 댄스 연습실 챌린지 동작 칼군무 춤선 직캠 센터 박자 댄서 영상 무대",
        "choreography cover dance practice challenge move sync dancer performance fancam center "
        "rhythm routine studio",
    ),
    "vocals": (
        "고음 보컬 라이브 음색 발라드 가창력 화음 커버곡 애드립 목소리 작곡 가사 멜로디 녹음",
        "vocal note ballad tone harmony adlib voice lyrics melody songwriter acoustic recording belt singer",
    ),
    "fashion": (
        "패션 화보 공항룩 착장 스타일 코디 브랜드 머리색 메이크업 액세서리 잡지 향수 가방 모델",
        "fashion photoshoot airport outfit style brand hair makeup accessory magazine perfume bag "
        "model runway",
    ),
    "fanart": (
        "팬아트 그림 스케치 색칠 그려 캐릭터 일러스트 커미션 펜선 채색 낙서 만화 원고 도안",
        "fanart drawing sketch colour character illustration commission lineart paint doodle comic "
        "canvas brush sticker",
    ),
    "shows": (
        "예능 본방 웃겨 자컨 클립 게임 케미 리얼리티 막내 출연 편집 자막 레전드 에피소드",
        "variety show episode funny clip game chemistry reality maknae guest edit subtitles legend moment",
    ),
    "study": (
        "공부 시험 과제 힐링 노동요 출근 퇴근 새벽 도서관 위로 알바 수능 아침 버스",
        "study exam homework comfort motivation commute morning library playlist work bus coffee "
        "focus midnight",
    ),
}
EVERYBODY = (
    "오늘 진짜 너무 좋다 사랑해 최고 행복 우리 정말 노래 컴백 팬 사람 생각 시간 내일 어제 하루 "
    "보고싶다 감사 축하 기다려 "
    "대박 예쁘다 멋지다 친구 마음 같이 계속 처음 다시 지금 항상 벌써 드디어 이번 다음 날씨 점심 저녁",
    "today really love best happy song comeback fan people think time tomorrow yesterday day "
    "miss thanks congrats "
    "waiting wow pretty cool friend heart together still first again now always already finally "
    "next weather lunch "
    "dinner good great new everyone see know feel year week",
)
PARTICLES = ("이", "가", "은", "는", "을", "를", "도", "랑", "에서", "까지", "만", "의")
# The most followed first; Latin and Korean spelling, and the account of some.
ARTISTS = """BTS | 방탄소년단 | @BTS_twt
BLACKPINK | 블랙핑크
SEVENTEEN | 세븐틴
IU | 아이유
Stray Kids | 스트레이 키즈
NewJeans | 뉴진스
TWICE | 트와이스
IVE | 아이브
aespa | 에스파
EXO | 엑소
LE SSERAFIM | 르세라핌
TXT | 투모로우바이투게더
ENHYPEN | 엔하이픈
NCT 127 | 엔시티 127
NCT DREAM | 엔시티 드림
Red Velvet | 레드벨벳
ATEEZ | 에이티즈
(G)I-DLE | 여자아이들
ITZY | 있지
MAMAMOO | 마마무
DAY6 | 데이식스
SHINee | 샤이니
BIGBANG | 빅뱅
Girls' Generation | 소녀시대
ZEROBASEONE | 제로베이스원
RIIZE | 라이즈
NMIXX | 엔믹스
KISS OF LIFE | 키스오브라이프
BABYMONSTER | 베이비몬스터
ILLIT | 아일릿
PLAVE | 플레이브
TREASURE | 트레저
THE BOYZ | 더보이즈
MONSTA X | 몬스타엑스
GOT7 | 갓세븐
STAYC | 스테이씨
Dreamcatcher | 드림캐쳐
AKMU | 악뮤
Taeyeon | 태연
Sunmi | 선미"""
